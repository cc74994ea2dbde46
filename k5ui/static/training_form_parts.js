/* Parts of the training form: model and weights, dataset, presets, more options, a state to go on from, the import. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const { makeField, typed, flag } = K5.trainFields;
  const redraw = (node, value, make) => K5.caching.redraw(node, value, make);
  const WEIGHTS = ["dit", "vae", "text_encoder_qwen", "text_encoder_clip"];
  const dotLine = (ok, text) => [el("i.k5-dot" + (ok ? ".ok" : "")), el("span", {}, text)];

  // --- model and weights ------------------------------------------------------------------------------------------
  const makeModel = (specs, change) => {
    const task = makeField(specs.task, change, { brief: true });
    const line = el("div.k5-t-line");
    const fields = WEIGHTS.map((name) => ({ name, field: makeField(specs[name], change, { brief: true }), line: el("div.k5-t-line") }));
    const others = el("details.k5-fold", {}, el("summary", {}, t("js.train.other_weights")),
      el("div.k5-t-options", {}, fields.map((one) => (one.field.box.append(one.line), one.field.box))));
    const box = el("section.k5-card.k5-t-section", {}, el("h3.k5-heading", {}, t("js.train.model")), task.box, line, others);
    const note = (part) => {
      if (!part.path) return part.needed ? part.text : part.text + " (" + t("js.train.only_samples") + ")";
      return part.text + (part.given ? "" : " · " + t("js.train.as_settings"));
    };
    const update = (state) => {
      const dit = state.weights.dit;
      redraw(line, [dit, K5.language], () => [...dotLine(dit.ok, dit.text || t("js.train.weights_ok")),
        dit.ok ? null : el("button.k5-link", { type: "button", onclick: () => K5.openTab("settings") }, t("js.to_settings"))]);
      K5.toggle(line, "bad", !dit.ok);
      for (const one of fields) {
        const part = state.weights[one.name];
        const input = one.field.box.querySelector("input");
        if (!part.given && part.path) input.placeholder = part.path;
        redraw(one.line, part, () => dotLine(part.ok || !part.needed, note(part)));
      }
    };
    return { box, update, fields: [task, ...fields.map((one) => one.field)], open: (name) => { if (WEIGHTS.includes(name)) others.open = true; } };
  };

  // --- dataset: which one, and its caches in one line ---------------------------------------------------------------
  const makeDataset = (actions) => {
    const select = el("select.k5-input", { id: "k5-t-dataset", "aria-label": t("js.train.dataset"), onchange: () => actions.dataset(select.value) });
    const line = el("div.k5-t-line");
    const cache = el("input", { type: "checkbox", id: "k5-t-cache_missing", onchange: () => actions.change("cache_missing", cache.checked || null) });
    const cacheRow = el("div.k5-t-cache", { hidden: true }, el("label", {}, cache, el("span", {}, t("js.train.cache_first"))),
      K5.button(t("js.train.to_caching"), () => K5.openTab("caching"), { kind: "plain" }));
    const trouble = el("div.k5-t-trouble", { role: "alert", hidden: true });
    const filled = el("div.k5-t-filled", {}, select, line, cacheRow, trouble);
    const empty = el("div.k5-t-nothing", { hidden: true }, el("div", {}, el("strong", {}, t("js.train.none_title")), el("div.k5-small", {}, t("js.train.none_text"))),
      K5.button(t("js.train.to_dataset"), () => K5.openTab("dataset"), {}));
    const box = el("section.k5-card.k5-t-section", { id: "k5-t-box-dataset_config" },
      el("div.k5-t-head", {}, el("h3.k5-heading", {}, t("js.train.dataset")), flag("dataset_config")), filled, empty);
    const update = (state) => {
      const data = state.dataset;
      filled.hidden = !data;
      empty.hidden = Boolean(data);
      redraw(select, state.datasets, () => state.datasets.map((item) => el("option", { value: item.id }, item.name)));
      if (!data) return;
      if (document.activeElement !== select) select.value = data.id;
      const wanted = state.values.cache_missing === true;
      const parts = [data.line];
      if (data.caching) parts.push(t("js.train.caching"));
      redraw(line, [parts, data.ready], () => dotLine(data.ready, parts.join(" · ")));
      cacheRow.hidden = !(data.can_cache || wanted);
      cache.checked = wanted;
      set(cacheRow.querySelector("span"), t(wanted ? "js.train.cache_first_on" : "js.train.cache_first"));
      const found = state.problems.filter((problem) => ["dataset_config", "cache_missing"].includes(problem.field) && problem.message !== data.line);
      set(trouble, found.map((problem) => problem.message).join(" "));
      trouble.hidden = !found.length;
    };
    return { box, update, focus: () => select.focus() };
  };

  // --- presets ----------------------------------------------------------------------------------------------------
  const makePresets = (presets, choose) => {
    const text = el("p.k5-small.k5-t-preset-text");
    const chips = presets.map((preset) => el("button.k5-chip", { type: "button", title: preset.text, "aria-pressed": "false", onclick: () => choose(preset.id) }, preset.title));
    const box = el("div.k5-t-presets", {}, el("h3.k5-heading", {}, t("js.train.preset")), el("div.k5-tools", {}, chips), text);
    const update = (state) => {
      presets.forEach((preset, index) => {
        K5.toggle(chips[index], "on", preset.id === state.preset);
        chips[index].setAttribute("aria-pressed", String(preset.id === state.preset));
      });
      const active = presets.find((preset) => preset.id === state.preset);
      set(text, active ? active.text : "");
      text.hidden = !active;
    };
    return { box, update };
  };

  // --- all other options, by group, with a search -------------------------------------------------------------------
  const makeMore = (specs, groups, change) => {
    const fields = specs.filter((spec) => spec.place === "group").map((spec) => makeField(spec, change));
    const search = el("input.k5-input", { type: "search", id: "k5-t-search", placeholder: t("js.train.search"), "aria-label": t("js.train.search"), autocomplete: "off" });
    const none = el("p.k5-small", { hidden: true }, t("js.train.search_none"));
    const folds = groups.map((group) => {
      const own = fields.filter((field) => field.spec.group === group.name);
      const count = el("span.k5-t-count");
      const advanced = own.filter((field) => field.spec.level === "advanced");
      const basic = own.filter((field) => field.spec.level !== "advanced");
      const node = el("details.k5-t-group", {}, el("summary", {}, el("span", {}, group.title), el("span.k5-grow"), count),
        el("div.k5-t-options", {}, [...basic, ...advanced].map((field) => field.box)));
      return { node, own, count, opened: false };
    }).filter((fold) => fold.own.length);
    const box = el("section.k5-card.k5-t-section.k5-t-more", {}, el("h3.k5-heading", {}, t("js.train.more")), search, none, folds.map((fold) => fold.node));
    let searched = false;
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let hits = 0;
      for (const fold of folds) {
        if (!searched) fold.opened = fold.node.open;
        let own = 0;
        for (const field of fold.own) {
          const hit = words.every((word) => field.text.includes(word));
          field.box.hidden = !hit;
          own += hit;
        }
        hits += own;
        fold.node.hidden = !own;
        fold.node.open = words.length ? own > 0 : fold.opened;
      }
      searched = words.length > 0;
      none.hidden = hits > 0;
    };
    search.addEventListener("input", filter);
    const update = (state) => {
      for (const fold of folds) {
        const changed = fold.own.filter((field) => state.values[field.spec.name] !== undefined).length;
        const wrong = fold.own.some((field) => state.problems.some((problem) => problem.field === field.spec.name));
        set(fold.count, changed ? t("js.train.changed", { n: changed }) : "");
        K5.toggle(fold.node, "k5-wrong", wrong);
      }
    };
    const open = (name) => {
      const fold = folds.find((one) => one.own.some((field) => field.spec.name === name));
      if (!fold) return;
      if (searched) {
        search.value = "";
        filter();
      }
      fold.node.open = true;
    };
    return { box, fields, update, open };
  };

  // --- a state to go on from ----------------------------------------------------------------------------------------
  const makeResume = (actions) => {
    const input = el("input.k5-input", { type: "text", id: "k5-t-resume", spellcheck: "false", autocomplete: "off", placeholder: t("js.train.resume_hint"), "aria-label": t("js.train.resume") });
    const go = () => input.value.trim() && actions.resume(input.value.trim());
    input.addEventListener("keydown", (event) => event.key === "Enter" && !event.ctrlKey && go());
    const ask = el("details.k5-fold", {}, el("summary", {}, t("js.train.resume")), el("div.k5-t-pair", {}, input, K5.button(t("js.train.resume_go"), go, {})));
    const card = el("div.k5-t-resume", { hidden: true });
    const row = (item) => el("li." + item.kind, {}, el("span.k5-state", {}, t("js.train.diff." + item.kind)),
      el("div", {}, el("b", {}, item.name), " ", el("span", {}, item.old || "–", " → ", item.new || "–"), item.why ? el("div.k5-small", {}, item.why) : null));
    const draw = (found) => [
      el("div.k5-t-head", {}, el("strong", {}, t("js.train.resume_from", { name: found.name })), el("span.k5-grow"),
        K5.button(t("js.train.resume_off"), () => actions.change("resume", null), { kind: "plain" })),
      found.step === null ? null : el("div.k5-small", {}, t("js.train.resume_step", { step: found.step, epoch: found.epoch }), found.run ? " · " + found.run : ""),
      found.problem ? el("div.k5-t-trouble", {}, found.problem) : null,
      found.problem ? null : found.rows.length ? el("ul.k5-t-diff", {}, found.rows.map(row)) : el("div.k5-small", {}, t("js.train.resume_same"))];
    const update = (state) => {
      const latest = state.values.resume === "latest";
      card.hidden = !state.resume && !latest;
      ask.hidden = !card.hidden;
      if (state.resume) redraw(card, state.resume, () => draw(state.resume));
      else if (latest) redraw(card, "latest", () => draw({ name: "latest", step: null, problem: "", rows: [] }));
    };
    return { box: el("div", { id: "k5-t-box-resume" }, card, ask), update };
  };

  // --- sample prompts, as lines -------------------------------------------------------------------------------------
  const makePrompts = (change) => {
    const area = el("textarea.k5-input.k5-t-prompts", { id: "k5-t-prompts", rows: 3, spellcheck: "false", placeholder: t("js.train.prompts_hint") });
    const typing = typed(area, () => change("prompts", area.value || null));
    const note = el("div.k5-small", { hidden: true }, t("js.train.prompts_file"));
    const trouble = el("div.k5-t-trouble", { role: "alert", hidden: true });
    const box = el("div.k5-t-option", { id: "k5-t-box-prompts" }, el("div.k5-t-head", {}, el("label", { for: "k5-t-prompts", title: t("js.train.prompts_hint") }, t("js.train.prompts")), flag("sample_prompts")), area, note, trouble);
    const update = (state) => {
      if (!typing.waits() && document.activeElement !== area) area.value = state.prompts;
      const file = state.values.sample_prompts !== undefined;
      note.hidden = !file;
      const found = file && !state.prompts ? [] : state.problems.filter((problem) => problem.field === "sample_prompts");
      set(trouble, found.map((problem) => problem.message).join("\n"));
      trouble.hidden = !found.length;
      K5.toggle(box, "k5-wrong", found.length);
    };
    return { box, update, focus: () => area.focus(), flush: typing.now };
  };

  // --- import: a text in, notes out ---------------------------------------------------------------------------------
  const noteList = (notes) => el("ul.k5-t-notes", {}, notes.map((note) => el("li." + note.kind, {},
    el("span.k5-state", {}, t("js.train.note." + note.kind)), el("div", {}, note.name ? el("code", {}, "--" + note.name) : null, " ", note.text))));
  const openImport = (host, take) => {
    const area = el("textarea.k5-command", { rows: 10, spellcheck: "false", id: "k5-t-import-text", "aria-label": t("js.train.import_title"),
      placeholder: "accelerate launch … kandinsky5_train_network.py \\\n  --task k5-pro-t2v-5s-sd \\\n  --learning_rate 1e-4" });
    const file = el("input", { type: "file", accept: ".sh,.bat,.cmd,.ps1,.txt,.toml", hidden: true, onchange: async () => {
      if (file.files.length) area.value = await file.files[0].text();
    } });
    const trouble = el("div.k5-t-trouble", { role: "alert", hidden: true });
    const go = async () => {
      const answer = await take(area.value);
      const message = answer ? answer.error || (answer.problems || []).map((problem) => problem.message).join(" ") : "";
      set(trouble, message || "");
      trouble.hidden = !message;
      if (!answer || message) return;
      dialog.close();
      if (!answer.notes.length) K5.notice(t("js.train.imported"));
      else openNotes(host, answer.notes);
    };
    const primary = K5.ds.primary(t("js.train.import_go"), go);
    primary.id = "k5-t-import-go";
    const dialog = K5.ds.dialog(host, t("js.train.import_title"), el("p.k5-small", {}, t("js.train.import_text")), area, trouble, file,
      el("div.k5-dialog-foot", {}, K5.button(t("js.train.import_file"), () => file.click(), { icon: "file" }), primary));
    K5.acceptDrop(area, async (dropped) => { area.value = await dropped.text(); });
    area.focus();
  };
  const openNotes = (host, notes) => K5.ds.dialog(host, t("js.train.notes"), noteList(notes));

  K5.trainParts = { makeModel, makeDataset, makePresets, makeMore, makeResume, makePrompts, openImport, WEIGHTS };
})();
