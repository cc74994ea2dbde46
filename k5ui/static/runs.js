/* The Runs tab: the table of all runs, and the details and log of one. */
(() => {
  "use strict";
  const { el, set, t } = K5;

  const chip = (state) => el("span.k5-state." + state, {}, K5.stateName(state));

  const makeTable = (open) => {
    const body = el("tbody");
    const empty = el("div.k5-empty", { hidden: true }, K5.icon("film"), el("strong", {}, t("js.no_runs")),
      K5.button(t("js.to_generate"), () => K5.openTab("generate"), {}));
    const heads = ["kind", "title", "state", "progress", "started", "took"].map((name) => el("th." + name, { scope: "col" }, t("js.col." + name)));
    const table = el("table.k5-table", {}, el("thead", {}, el("tr", {}, heads)), body);
    const rows = new Map();
    const make = (run) => {
      const cells = { kind: el("td.kind"), title: el("td.title"), state: el("td.state"), progress: el("td.progress"), started: el("td.started"), took: el("td.took") };
      const bar = el("i");
      const text = el("span.k5-small");
      cells.progress.append(el("span.k5-bar", {}, bar), text);
      const link = el("button.k5-link", { type: "button", onclick: (event) => (event.stopPropagation(), open(run.id)) });
      cells.title.append(link);
      const node = el("tr", { onclick: () => open(run.id) }, Object.values(cells));
      return { node, cells, bar, text, link, state: "" };
    };
    const fill = (row, run) => {
      set(row.cells.kind, t("js.kind." + run.kind));
      set(row.link, run.title || run.prompt || run.id);
      if (K5.caches(run)) row.link.dataset.kind = t("js.kind." + run.kind) + ": ";
      row.link.title = run.prompt || "";
      if (row.state !== run.state) {
        row.state = run.state;
        row.cells.state.replaceChildren(chip(run.state));
      }
      row.bar.style.width = (run.state === "finished" ? 100 : K5.percent(run)) + "%";
      set(row.text, K5.running(run.state) || K5.caches(run) ? K5.progressText(run) : run.total ? t("js.step", { step: run.step || 0, total: run.total }) : "");
      set(row.cells.started, K5.moment(run.started || run.created));
      set(row.cells.took, K5.seconds(run.seconds));
    };
    const show = (runs) => {
      const wanted = new Set(runs.map((run) => run.id));
      for (const [id, row] of rows) {
        if (!wanted.has(id)) {
          row.node.remove();
          rows.delete(id);
        }
      }
      runs.forEach((run, index) => {
        if (!rows.has(run.id)) rows.set(run.id, make(run));
        const row = rows.get(run.id);
        fill(row, run);
        if (body.children[index] !== row.node) body.insertBefore(row.node, body.children[index] || null);
      });
      empty.hidden = runs.length > 0;
      table.hidden = runs.length === 0;
    };
    const mark = (id) => {
      for (const [key, row] of rows) K5.toggle(row.node, "on", key === id);
    };
    return { box: el("div.k5-runs-list", {}, table, empty), show, mark };
  };

  // A terminal's view of a growing text: \r starts the line again, so a progress bar is one line.
  K5.makeLog = () => {
    const box = el("pre.k5-log", { tabindex: "0", "aria-label": t("js.log") });
    let lines = [""];
    let fresh = true;
    let pendingReturn = false;
    const clear = () => {
      lines = [""];
      fresh = true;
      pendingReturn = false;
      box.textContent = "";
    };
    const add = (text) => {
      const atEnd = fresh || box.scrollHeight - box.scrollTop - box.clientHeight < 24;
      fresh = false;
      for (const part of text.split(/(\r\n|\n|\r)/)) {
        if (part === "") continue;
        if (part === "\n" || part === "\r\n") {
          lines.push("");
          pendingReturn = false;
        } else if (part === "\r") pendingReturn = true;
        else {
          if (pendingReturn) lines[lines.length - 1] = "";
          pendingReturn = false;
          lines[lines.length - 1] += part;
        }
      }
      if (lines.length > 5000) lines = lines.slice(-4000);
      box.textContent = lines.join("\n");
      if (atEnd) box.scrollTop = box.scrollHeight;
    };
    return { box, add, clear };
  };

  const makeDetails = (actions, makeView) => {
    const head = el("div.k5-row");
    const live = el("div.k5-live-line");
    const bar = el("i");
    const facts = el("dl.k5-dl");
    const troubles = el("div.k5-troubles");
    const outputs = el("div.k5-outputs");
    const tools = el("div.k5-tools");
    const log = K5.makeLog();
    const options = el("pre.k5-log");
    const plain = el("div.k5-details-plain", {}, el("div.k5-live-text", {}, live, el("div.k5-bar", {}, bar)), tools, outputs, troubles, facts,
      el("h3.k5-heading", {}, t("js.log")), log.box);
    const viewTools = el("div.k5-tools");
    const viewPlace = el("div.k5-details-view", { hidden: true }, viewTools);
    const box = el("section.k5-details", { "aria-label": t("js.details") },
      head, plain, viewPlace, el("details", {}, el("summary", {}, "options.toml"), options));
    // A training is shown by the same live view as in its own tab; it is made when the first one is opened.
    let view = null;
    const showView = (run) => {
      const wanted = run.kind === "train";
      plain.hidden = wanted;
      viewPlace.hidden = !wanted;
      K5.toggle(box, "training", wanted);
      if (!wanted) return;
      if (!view) {
        view = makeView();
        viewPlace.append(view.box);
      }
      view.open(run.id);
    };
    let id = null;
    let offset = 0;
    let state = "";
    let drawn = "";
    const open = (wanted) => {
      if (wanted === id) return;
      id = wanted;
      offset = 0;
      state = drawn = "";
      log.clear();
      outputs.replaceChildren();
      troubles.replaceChildren();
      K5.toggle(box, "open", id);
    };
    const drawTools = (run) => {
      const active = K5.running(run.state);
      tools.replaceChildren(...[
        active ? K5.button(t("js.stop"), () => actions.stop(run.id), { icon: "stop" }) : null,
        active ? K5.sureButton(t("js.kill"), () => actions.kill(run.id), { kind: "plain", title: t("js.kill_title") }) : null,
        run.state === "queued" ? K5.button(t("js.dequeue"), () => actions.dequeue(run.id), { icon: "close" }) : null,
        run.kind === "generate" ? K5.button(t("js.clone"), () => actions.clone(run.id), { icon: "use", kind: "plain" }) : null,
        K5.button(t("js.live.compare_runs"), () => actions.compare(run.id), { kind: "plain" }),
        active ? null : trash(run),
      ].filter(Boolean));
      viewTools.replaceChildren(...[K5.button(t("js.live.compare_runs"), () => actions.compare(run.id), { kind: "plain" }), active ? null : trash(run)].filter(Boolean));
    };
    const trash = (run) => K5.sureButton(t("js.trash"), () => actions.trash(run.id), { icon: "trash", kind: "plain" });
    const drawOnce = (run) => {
      const mark = JSON.stringify([run.state, run.outputs, run.problems, run.warnings, run.message]);
      if (mark === drawn) return;
      drawn = mark;
      head.replaceChildren(el("strong.k5-clip-text", {}, (K5.caches(run) ? t("js.kind." + run.kind) + ": " : "") + (run.title || run.prompt || run.id)), chip(run.state),
        K5.button("", () => actions.close(), { icon: "close", kind: "plain", title: t("js.close") }));
      if (state !== run.state) drawTools(run);
      state = run.state;
      outputs.replaceChildren(...(run.outputs || []).filter((clip) => clip.url).map((clip) => {
        if (clip.kind === "latent") return el("a.k5-link", { href: K5.url(clip.url), download: "" }, t("js.latent"));
        if (clip.kind === "video") {
          const video = el("video", { src: K5.url(clip.url), loop: true, controls: true, playsInline: true, preload: "metadata" });
          video.muted = true;
          return video;
        }
        return el("img", { src: K5.url(clip.url), alt: clip.prompt || "" });
      }));
      const sentence = (item) => (typeof item === "string" ? item : item.field ? item.field + ": " + item.message : item.message);
      troubles.replaceChildren(
        ...(run.problems || []).map((item) => el("p.k5-trouble.bad", {}, sentence(item))),
        ...(run.warnings || []).map((item) => el("p.k5-trouble", {}, sentence(item))),
        ...(!(run.problems || []).length && ["failed", "crashed", "interrupted"].includes(run.state) && run.message ? [el("p.k5-trouble.bad", {}, run.message)] : []));
      const rows = [["id", run.id], ["task", run.task], ["prompt", run.prompt], ["seed", run.seed], ["created", K5.moment(run.created)],
        ["took", K5.seconds(run.seconds)], ["exit", run.exit_code]].filter(([, value]) => value !== null && value !== undefined && value !== "");
      facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, t("js.fact." + name)), el("dd", {}, String(value))]));
      set(options, run.options_toml || "");
    };
    const refresh = async () => {
      if (!id || !K5.shown(box)) return;
      const asked = id;
      try {
        const run = await K5.get("runs/" + encodeURIComponent(asked));
        if (asked !== id) return;
        drawOnce(run);
        showView(run);
        if (run.kind === "train") return;
        const doing = [run.phase ? K5.phaseName(run) : K5.stateName(run.state), run.total || !K5.caches(run) ? K5.progressText(run) : "", run.item_name];
        set(live, K5.running(run.state) ? doing.filter(Boolean).join(" · ") : "");
        bar.style.width = (run.state === "finished" ? 100 : K5.percent(run)) + "%";
        let page = await K5.get("runs/" + encodeURIComponent(asked) + "/log?offset=" + (offset || -65536));
        for (let round = 0; asked === id && round < 8; round += 1) {
          if (page.text) log.add(page.text);
          offset = page.offset;
          if (page.offset >= page.size) break;
          page = await K5.get("runs/" + encodeURIComponent(asked) + "/log?offset=" + offset);
        }
      } catch (error) {
        if (String(error.message).endsWith("404") && asked === id) actions.close();
      }
    };
    return { box, open, refresh, offer: (runs) => view && view.offer(runs), id: () => id, state: () => state };
  };

  K5.parts.runs = (root, { server, trigger }) => {
    let at = 0;
    let busy = false;
    let version = null;
    let runs = [];
    let known = "";
    const open = (id) => {
      known = "";
      details.open(id);
      table.mark(id);
      K5.toggle(root, "with-details", id);
      refresh(true);
    };
    const after = (promise) => promise.then(() => refresh(true));
    const actions = {
      stop: (id) => after(K5.ask(server, "stop", id)),
      kill: (id) => after(K5.ask(server, "kill", id)),
      dequeue: (id) => after(K5.ask(server, "dequeue", id)),
      trash: (id) => K5.ask(server, "trash", id).then(() => open(null)),
      clone: (id) => {
        trigger("clone", { run: id });
        K5.openTab("generate");
      },
      compare: (id) => K5.compareRuns(id, runs),
      close: () => open(null),
    };
    const table = makeTable(open);
    const details = makeDetails(actions, () => K5.trainingLive({ ask: (name, ...values) => K5.ask(server, name, ...values), trigger }));
    root.append(table.box, details.box);
    const refresh = async (now) => {
      if (busy || !K5.shown(root)) return;
      const status = K5.status || {};
      const moving = status.running || (status.queue || []).length || status.version !== version;
      if (!now && !moving && Date.now() - at < 5000) return;
      busy = true;
      try {
        runs = (await K5.get("runs?limit=200")).runs;
        table.show(runs);
        table.mark(details.id());
        version = status.version;
        at = Date.now();
        await details.refresh();
        const trainings = runs.filter((run) => run.kind === "train");
        const offered = JSON.stringify(trainings.map((run) => [run.id, run.state]));
        if (offered !== known) details.offer(trainings);
        known = offered;
      } catch (error) {
        at = 0; // the header says that the server is away; the next status asks again
      }
      busy = false;
    };
    K5.on("status", () => refresh(false));
    K5.on("open-run", open);
    K5.on("escape", () => K5.shown(root) && open(null));
    if (K5.wantedRun) open(K5.wantedRun);
    else refresh(true);
  };
})();
