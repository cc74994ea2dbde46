/* The Caching tab: which dataset, what its caches are worth, what is left to do, and the run that does it. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const { plural, size, redraw } = K5.caching;
  const KINDS = ["cache_text", "cache_latents"];

  // --- options: made from their definition, as the forms of the other tabs ---------------------------------------
  const makeOption = (option, change) => {
    const id = "k5-c-" + option.name;
    let input;
    if (option.kind === "bool") {
      input = el("input", { type: "checkbox", id, onchange: () => change(option.name, input.checked) });
    } else if (option.choices) {
      input = el("select.k5-input", { id, onchange: () => change(option.name, input.value || null) },
        option.choices.map(([label, value]) => el("option", { value }, label)));
    } else if (option.kind === "str") {
      input = el("input.k5-input", { type: "text", id, spellcheck: "false", placeholder: option.placeholder, onchange: () => change(option.name, input.value.trim() || null) });
    } else {
      input = el("input.k5-input", { type: "number", step: "1", id, placeholder: option.placeholder,
        onchange: () => change(option.name, input.value === "" ? null : Number(input.value)) });
    }
    const trouble = el("div.k5-c-trouble", { role: "alert", hidden: true });
    const label = el("label", { for: id }, option.label);
    const box = el("div.k5-c-option" + (option.kind === "bool" ? ".switch" : ""), {},
      ...(option.kind === "bool" ? [input, label] : [label, input]), option.help ? el("p.k5-small", {}, option.help) : null, trouble);
    const show = (value) => {
      if (document.activeElement === input) return;
      if (option.kind === "bool") input.checked = value === true;
      else input.value = value === null || value === undefined ? (option.choices ? option.default || "" : "") : String(value);
    };
    const complain = (messages) => {
      set(trouble, messages.join(" "));
      trouble.hidden = !messages.length;
      K5.toggle(box, "k5-wrong", messages.length);
    };
    return { box, show, complain };
  };

  // --- the band over everything: what runs, or what state the dataset is in ---------------------------------------
  const makeBand = (stop) => {
    const picture = el("img", { alt: "", hidden: true });
    const frame = el("div.k5-band-frame", {}, K5.icon("film"), picture);
    const rows = el("div.k5-band-rows");
    const stopButton = K5.button(t("js.stop"), stop, { icon: "stop", title: t("js.caching.stop_title") });
    const box = el("section.k5-card.k5-band", { "aria-live": "off" }, frame, rows, stopButton);
    const made = new Map();
    let shown = "";
    let loaded = 0;

    const makeRow = () => {
      const name = el("strong");
      const numbers = el("span.k5-numbers");
      const bar = el("i");
      const item = el("span.k5-small.k5-band-item");
      return { name, numbers, bar, item, box: el("div.k5-band-row", {}, el("div.k5-row", {}, name, item, el("span.k5-grow"), numbers), el("div.k5-bar", {}, bar)) };
    };
    const numbersOf = (run) => {
      if (run.state === "queued") return t("js.state.queued");
      if (!run.total || run.state !== "running") return run.state === "running" ? K5.phaseName(run) : K5.stateName(run.state);
      const parts = [t("js.caching.of", { n: run.step || 0, total: run.total })];
      if (run.seconds_per_item) parts.push(K5.perSecond(run.seconds_per_item));
      if (run.remaining_seconds) parts.push(t("js.left", { time: K5.seconds(run.remaining_seconds) }));
      return parts.join(" · ");
    };
    const showFrame = (address) => {
      if (!address || address === shown || Date.now() - loaded < 900) return;
      shown = address;
      loaded = Date.now();
      const next = new Image();
      next.onload = () => {
        picture.src = next.src;
        picture.hidden = false;
      };
      next.src = K5.url("api/" + address);
    };
    const update = (page) => {
      const runs = page ? page.runs : [];
      const ids = runs.map((run) => run.id);
      for (const id of [...made.keys()]) {
        if (ids.includes(id)) continue;
        made.get(id).box.remove();
        made.delete(id);
      }
      if (runs.length && rows.querySelector(".k5-band-idle")) rows.replaceChildren();
      for (const run of runs) {
        if (!made.has(run.id)) made.set(run.id, makeRow());
        const row = made.get(run.id);
        set(row.name, t("js.caching.doing." + run.kind));
        set(row.numbers, numbersOf(run));
        set(row.item, run.item || "");
        row.bar.style.width = K5.percent(run) + "%";
        K5.toggle(row.box, "waiting", run.state === "queued");
        if (!row.box.isConnected) rows.append(row.box);
      }
      stopButton.hidden = !runs.length;
      stopButton.disabled = runs.length > 0 && runs.every((run) => run.state === "stopping");
      showFrame((runs.find((run) => run.frame) || {}).frame);
      if (runs.length) return;
      picture.hidden = true;
      shown = "";
      const [title, text, state] = idle(page);
      K5.toggle(box, "ready", state === "ready");
      rows.replaceChildren(el("div.k5-band-idle", {}, el("strong", {}, title), el("span.k5-small", {}, text)));
    };
    const idle = (page) => {
      if (!page || (!page.checked && !page.error)) return [t("js.caching.checking"), t("js.caching.checking_text"), ""];
      if (page.error) return [t("js.caching.unreadable"), page.error, ""];
      const bytes = page.entries.reduce((sum, entry) => sum + (entry.latents ? entry.latents.bytes + entry.texts.bytes : 0), 0);
      if (page.ready) return [t("js.caching.ready"), t("js.caching.ready_text", { size: size(bytes) }), "ready"];
      const left = page.needs ? page.needs.pending : {};
      const parts = [];
      if (left.cache_text) parts.push(plural("js.caching.captions.", left.cache_text));
      if (left.cache_latents) parts.push(plural("js.caching.clips.", left.cache_latents));
      if (!parts.length) return [t("js.caching.not_ready"), t("js.caching.not_ready_text"), ""];
      return [t("js.caching.todo", { what: parts.join(", ") }), bytes ? t("js.caching.todo_text", { size: size(bytes) }) : t("js.caching.todo_none"), ""];
    };
    return { box, update };
  };

  // --- how the last runs ended, where that is not simply well -----------------------------------------------------
  const makeLast = (retry) => {
    const box = el("div.k5-c-last");
    const title = (run) => {
      if (run.state === "finished") return plural("js.caching.left_out.", run.warnings_total);
      if (run.state === "stopped" && run.total) return t("js.caching.stopped_at", { n: run.step || 0, total: run.total });
      return K5.stateName(run.state);
    };
    const card = (run) => {
      const bad = run.state !== "stopped";
      const lines = [...run.problems, ...(run.problems.length || !run.message || !bad ? [] : [run.message]), ...run.warnings];
      const what = run.kind === "cache_text" ? "text" : "latents";
      return el("section.k5-c-failure" + (bad ? ".bad" : ""), {},
        el("div.k5-row", {}, el("strong", {}, t("js.kind." + run.kind)), el("span", {}, title(run)), el("span.k5-grow"),
          K5.button(t("js.details"), () => K5.openRun(run.id), { kind: "plain" }),
          K5.button(t(bad ? "js.caching.retry" : "js.caching.continue"), () => retry(what), { icon: "again" })),
        lines.length ? el("ul", {}, lines.map((line) => el("li", {}, line))) : null);
    };
    const update = (page) => {
      const left = page && page.needs ? page.needs.pending : {};
      const shown = page && !page.runs.length ? page.last.filter((run) => !["stopped", "finished"].includes(run.state) || left[run.kind]) : [];
      redraw(box, shown, () => shown.map(card));
    };
    return { box, update };
  };

  // --- starting ---------------------------------------------------------------------------------------------------
  const makeStart = (actions) => {
    const fields = new Map();
    const needs = el("div.k5-needs");
    const problems = el("ul.k5-problems");
    const model = el("div");
    const advanced = el("div.k5-c-options");
    const again = makeOption({ name: "again", kind: "bool", label: t("js.caching.again"), help: t("js.caching.again_help") }, actions.change);
    const button = (what, label, title) => K5.button(label, () => actions.cache(what), { title });
    const all = el("button.k5-start", { type: "button", id: "k5-cache-all", title: "Ctrl+Enter", onclick: () => actions.cache("all") }, el("span", {}, t("js.caching.all")), el("kbd", {}, "Ctrl ⏎"));
    const latents = button("latents", t("js.caching.do_latents"), t("js.caching.do_latents_title"));
    const text = button("text", t("js.caching.do_text"), t("js.caching.do_text_title"));
    const stale = button("stale", t("js.caching.do_stale"), t("js.caching.do_stale_title"));
    latents.id = "k5-cache-latents";
    text.id = "k5-cache-text";
    stale.id = "k5-cache-stale";
    const box = el("section.k5-card.k5-c-start", {}, model, needs, again.box, problems, all, el("div.k5-c-buttons", {}, latents, text, stale),
      el("details.k5-fold", {}, el("summary", {}, t("js.caching.advanced")), advanced));

    const build = (form) => {
      fields.clear();
      const make = (option) => {
        const field = makeOption(option, actions.change);
        fields.set(option.name, field);
        return field.box;
      };
      model.replaceChildren(make(form.task));
      advanced.replaceChildren(...form.groups.flatMap((group) => [el("h3.k5-heading", {}, group.title), ...group.options.map(make)]));
    };
    const fill = (values, isAgain) => {
      for (const [name, field] of fields) field.show(values[name]);
      again.show(isAgain);
    };
    const time = (seconds) => (seconds === null || seconds === undefined ? t("js.caching.time_unknown") : t("js.caching.about", { time: K5.seconds(seconds) }));
    const row = (kind, need) => el("div.k5-need", {}, el("span", {}, t("js.kind." + kind)),
      el("span", {}, need.items ? t("js.caching.items_left", { n: need.items }) : t("js.caching.nothing_left")),
      el("span", {}, !need.items ? "" : kind === "cache_text" ? t("js.caching.up_to", { size: size(need.bytes) }) : size(need.bytes)), el("span", {}, need.items ? time(need.seconds) : ""));
    const drawNeeds = (found) => {
      const need = KINDS.reduce((sum, kind) => sum + found[kind].bytes, 0);
      const short = found.free !== null && need > found.free;
      return [...KINDS.map((kind) => row(kind, found[kind])),
        el("div.k5-need" + (short ? ".bad" : ""), {}, el("span", {}, t("js.caching.disk")),
          el("span", {}, found.free === null ? "" : t("js.caching.free", { size: size(found.free) })))];
    };
    const complain = (found) => {
      const own = found.filter((problem) => fields.has(problem.field));
      for (const [name, field] of fields) field.complain(own.filter((problem) => problem.field === name).map((problem) => problem.message));
      const weights = found.some((problem) => ["vae", "text_encoder_qwen", "text_encoder_clip"].includes(problem.field));
      redraw(problems, found, () => [
        ...found.map((problem) => el("li", {}, (problem.label ? problem.label + " " : "") + problem.message)),
        weights ? el("li", {}, el("button.k5-link", { type: "button", onclick: () => K5.openTab("settings") }, t("js.to_settings"))) : null]);
    };
    const update = (page) => {
      const busy = !page || page.runs.length > 0;
      const found = page ? page.problems : [];
      K5.toggle(all, "blocked", found.length > 0);
      for (const node of [all, latents, text, stale]) node.disabled = busy;
      if (page && page.needs) {
        redraw(needs, page.needs, () => drawNeeds(page.needs));
        const left = KINDS.reduce((sum, kind) => sum + page.needs.pending[kind], 0);
        set(stale.querySelector("span"), left ? t("js.caching.do_stale_n", { n: left }) : t("js.caching.do_stale"));
        stale.disabled = busy || !left;
      }
      complain(found);
    };
    return { box, build, fill, update, complain };
  };

  // --- the tab ----------------------------------------------------------------------------------------------------
  K5.parts.caching = (root, { server }) => {
    let chosen = null;
    let known = [];
    let asking = false;
    let started = 0;
    const turns = {};
    const ask = (name, ...values) => K5.ask(server, name, ...values).then((answer) => (refresh(), answer));
    const actions = {
      cache: async (what) => {
        if (!chosen || Date.now() - started < 800) return; // a double click is one wish
        started = Date.now();
        const answer = await ask("cache", chosen, what, {});
        if (answer && answer.problems) {
          start.complain(answer.problems);
          K5.notice(answer.problems.map((problem) => problem.message).join("\n"), "bad");
        }
      },
      prune: () => ask("prune", chosen).then((answer) => answer && !answer.error && K5.notice(t("js.caching.pruning"))),
      stop: () => ask("stop", chosen),
      change: (name, value) => ask("change", name, value),
    };
    const select = el("select.k5-input.k5-c-select", { "aria-label": t("js.caching.dataset"), onchange: () => choose(select.value, true) });
    const path = el("span.k5-small.k5-c-path");
    const checked = el("span.k5-small.k5-c-checked");
    const toDataset = () => {
      if (chosen) K5.emit("dataset", chosen);
      K5.openTab("dataset");
    };
    const head = el("div.k5-c-head", {}, select, path, el("span.k5-grow"), checked,
      K5.button(t("js.caching.check"), () => ask("check", chosen), { icon: "again", kind: "plain", title: t("js.caching.check_title") }),
      K5.button(t("js.caching.open_dataset"), toDataset, { icon: "film", kind: "plain" }));
    const band = makeBand(actions.stop);
    const last = makeLast(actions.cache);
    const ledger = K5.ledger(actions);
    const start = makeStart(actions);
    const body = el("div.k5-c-columns", {}, ledger.box, el("aside.k5-c-side", {}, start.box));
    const full = el("div.k5-c-full", {}, head, band.box, last.box, body);
    const empty = el("div.k5-empty", { hidden: true }, K5.icon("film"), el("strong", {}, t("js.caching.none_title")),
      el("span", {}, t("js.caching.none_text")), K5.button(t("js.caching.to_dataset"), toDataset, {}));
    root.append(full, empty);

    const choose = (id, keep) => {
      if (!id || id === chosen) return;
      chosen = id;
      select.value = id;
      ledger.clear();
      draw(null);
      if (keep) {
        K5.emit("dataset", id);
        K5.ask(server, "change", "dataset", id);
      }
      refresh();
    };
    const drawHead = () => {
      redraw(select, known, () => known.map((item) => el("option", { value: item.id }, item.name)));
      if (chosen) select.value = chosen;
      const item = known.find((one) => one.id === chosen);
      set(path, item ? item.path : "");
      path.title = path.textContent;
      full.hidden = !known.length;
      empty.hidden = known.length > 0;
    };
    const draw = (page) => {
      band.update(page);
      last.update(page);
      start.update(page);
      if (!page) return;
      ledger.update(page.entries);
      set(checked, page.checking ? t("js.caching.checking") : page.checked ? t("js.caching.checked", { time: K5.moment(page.checked) }) : "");
      const turn = page.note ? page.note.turn : 0;
      if (page.id in turns && turn !== turns[page.id]) K5.notice(page.note.text, page.note.kind);
      turns[page.id] = turn;
    };
    let again = false;
    let later = 0;
    const refresh = async () => {
      again = again || asking;
      if (asking || !K5.shown(root)) return;
      asking = true;
      clearTimeout(later);
      try {
        const overview = await K5.get("caching");
        known = overview.datasets;
        if (!known.some((item) => item.id === chosen)) chosen = overview.chosen;
        drawHead();
        start.fill(overview.values, overview.again);
        if (chosen) {
          const page = await K5.get("caching/" + encodeURIComponent(chosen));
          if (page.id === chosen) draw(page);
          if (page.checking) later = setTimeout(refresh, 400);
        }
      } catch (error) {
        later = setTimeout(refresh, 3000); // the header says that the server is away
      }
      asking = false;
      if (again) {
        again = false;
        refresh();
      }
    };
    K5.on("status", refresh);
    K5.on("dataset", (id) => choose(id, false));
    K5.on("start", () => K5.shown(root) && actions.cache("all"));
    draw(null);
    return {
      update(value) {
        if (!value || !value.task) return;
        start.build(value);
        refresh();
      },
    };
  };
})();
