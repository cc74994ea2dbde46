/* The Dataset tab: the list of datasets, the head of the open one, and its views (each in a dataset_*.js of its own). */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = (K5.ds = { views: {} });
  const VIEWS = ["items", "setup", "seen", "buckets", "lint", "toml"];
  const LEDGER_WAIT = 10_000; // milliseconds between two looks at what is cached
  const KEPT = "k5-dataset"; // which dataset and view were open; nothing else is kept in the browser

  Object.assign(K5.shapes, {
    folder: "M3 6V5h5l2 2h7v9H3z",
    search: "M9 4a5 5 0 1 0 0 10A5 5 0 0 0 9 4zM13 13l4 4",
    undo: "M7 4L3 8l4 4M3 8h8a5 5 0 0 1 0 10H8",
    redo: "M13 4l4 4-4 4M17 8H9a5 5 0 0 0 0 10h3",
    up: "M10 16V5M5 10l5-5 5 5",
    left: "M12 5l-5 5 5 5",
    right: "M8 5l5 5-5 5",
    tick: "M4 10l4 4 8-8",
    eye: "M2 10s3-5 8-5 8 5 8 5-3 5-8 5-8-5-8-5zM10 8a2 2 0 1 0 0 4 2 2 0 0 0 0-4z",
    hide: "M4 4l12 12M2 10s3-5 8-5 8 5 8 5-3 5-8 5-8-5-8-5z",
    image: "M3 4h14v12H3zM3 14l4-4 3 3 3-4 4 4M7 7.5h.01",
    warn: "M10 3l8 14H2zM10 8v4M10 14.5h.01",
    text: "M4 5h12M4 10h12M4 15h7",
  });

  // --- what the views share --------------------------------------------------------------------------------------
  ds.number = (value) => Number(value).toLocaleString(K5.language);
  // "3 clips" with the word in the form that the language wants.
  ds.many = (name, n) => t("js.ds.n." + name + "." + new Intl.PluralRules(K5.language).select(n), { n: ds.number(n) });
  ds.bytes = (value) => {
    if (value < 1e6) return t("js.ds.kb", { n: Math.max(1, Math.round(value / 1e3)) });
    return value < 1e9 ? t("js.ds.mb", { n: (value / 1e6).toFixed(1) }) : t("js.ds.gb", { n: K5.gigabytes(value) });
  };
  ds.scanning = ({ done, total }) => (total ? t("js.ds.scanning", { done: ds.number(done), total: ds.number(total) }) : t("js.ds.scanning_first"));
  ds.sentence = (problem) => (problem.field ? problem.field + ": " : "") + problem.message;
  ds.icon = (name, title) => {
    const icon = K5.icon(name);
    return el("span.k5-ds-icon", { title, role: title ? "img" : null, "aria-label": title }, icon);
  };
  ds.debounce = (action, wait) => {
    let timer = 0;
    const later = (...values) => {
      clearTimeout(timer);
      timer = setTimeout(() => action(...values), wait);
    };
    later.cancel = () => clearTimeout(timer);
    return later;
  };
  ds.select = (label, choices, value, action) => {
    const node = el("select.k5-input.k5-ds-select", { "aria-label": label, onchange: () => action(node.value) },
      choices.map(([key, text]) => el("option", { value: key }, text)));
    node.value = value;
    return node;
  };
  // A line of buttons of which one is on; arrows move between them as in any list of tabs.
  ds.tabs = (label, names, text, open) => {
    const buttons = names.map((name) => el("button.k5-ds-tab", {
      type: "button", role: "tab", id: "k5-ds-tab-" + name, "aria-controls": "k5-ds-view", onclick: () => open(name),
    }, el("span", {}, text(name)), el("span.k5-ds-count")));
    const box = el("div.k5-ds-tabs", { role: "tablist", "aria-label": label }, buttons);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const at = buttons.indexOf(document.activeElement);
      if (!step || at < 0) return;
      event.preventDefault();
      const next = buttons[(at + step + buttons.length) % buttons.length];
      next.focus();
      next.click();
    });
    const mark = (name) => buttons.forEach((button, index) => {
      const on = names[index] === name;
      K5.toggle(button, "on", on);
      button.setAttribute("aria-selected", String(on));
      button.tabIndex = on ? 0 : -1;
      if (on && box.scrollWidth > box.clientWidth) box.scrollLeft = button.offsetLeft - (box.clientWidth - button.offsetWidth) / 2;
    });
    const count = (name, n) => set(buttons[names.indexOf(name)].lastChild, n ? ds.number(n) : "");
    return { box, mark, count };
  };
  // Calls a verb. A conflict and problems at fields are the caller's to show; any other trouble becomes a notice.
  ds.call = async (server, name, ...values) => {
    try {
      const answer = await server[name](values);
      if (answer && answer.error && !answer.conflict && !answer.problems) K5.notice(answer.error, "bad");
      K5.poke();
      return answer || {};
    } catch (error) {
      K5.notice(t("js.unreachable"), "bad");
      return { error: t("js.unreachable") };
    }
  };

  const kept = () => {
    try {
      return JSON.parse(localStorage.getItem(KEPT)) || {};
    } catch (error) {
      return {};
    }
  };
  const keep = (values) => {
    try {
      localStorage.setItem(KEPT, JSON.stringify(values));
    } catch (error) {
      // A browser that keeps nothing opens the first dataset.
    }
  };

  // --- the list --------------------------------------------------------------------------------------------------
  const makeList = (open, actions) => {
    const items = el("div.k5-ds-names", { role: "list" });
    const buttons = el("div.k5-ds-add", {},
      K5.button(t("js.ds.new"), actions.create, { icon: "plus", kind: "k5-ds-new" }),
      K5.button(t("js.ds.open_toml"), actions.openFile, { icon: "file", kind: "plain" }));
    const box = el("nav.k5-ds-list", { "aria-label": t("js.ds.datasets") },
      el("h3.k5-heading", {}, t("js.ds.datasets")), items, buttons);
    const rows = new Map();
    const health = (dataset) => {
      if (!dataset.scanned) return ["", ""];
      if (dataset.problems.length) return ["bad", ds.many("problems", dataset.problems.length)];
      const skipped = dataset.entries.reduce((sum, entry) => sum + (entry.enabled ? entry.skipped || 0 : 0), 0);
      const silent = dataset.entries.reduce((sum, entry) => sum + (entry.enabled ? entry.missing_captions || 0 : 0), 0);
      if (silent) return ["warn", t("js.ds.no_caption_n", { n: ds.number(silent) })];
      if (skipped) return ["warn", t("js.ds.skipped_n", { n: ds.number(skipped) })];
      return ["ok", ""];
    };
    const facts = (dataset, trouble) => {
      if (dataset.scanning && !dataset.scanned) return ds.scanning(dataset.scanning);
      const counted = dataset.items === null || dataset.items === undefined ? "" : ds.many("items", dataset.items);
      return [counted, trouble].filter(Boolean).join(" · ");
    };
    const show = (datasets, chosen) => {
      const wanted = new Set(datasets.map((dataset) => dataset.id));
      for (const [id, row] of rows) {
        if (!wanted.has(id)) {
          row.node.remove();
          rows.delete(id);
        }
      }
      datasets.forEach((dataset, index) => {
        if (!rows.has(dataset.id)) {
          const row = { dot: el("span.k5-ds-dot", { "aria-hidden": "true" }), name: el("strong"), text: el("span.k5-small") };
          row.button = el("button.k5-ds-name", { type: "button", onclick: () => open(dataset.id) },
            row.dot, el("span.k5-ds-name-text", {}, row.name, row.text));
          row.node = el("div", { role: "listitem" }, row.button);
          rows.set(dataset.id, row);
        }
        const row = rows.get(dataset.id);
        const [state, trouble] = health(dataset);
        set(row.name, dataset.name);
        set(row.text, facts(dataset, trouble));
        row.dot.className = "k5-ds-dot " + state;
        row.button.title = dataset.path;
        K5.toggle(row.button, "on", dataset.id === chosen);
        row.button.setAttribute("aria-current", String(dataset.id === chosen));
        if (items.children[index] !== row.node) items.insertBefore(row.node, items.children[index] || null);
      });
    };
    return { box, show };
  };

  // --- the head of the open dataset ------------------------------------------------------------------------------
  const makeHead = (ctx) => {
    const name = el("h2.k5-ds-title");
    const path = el("span.k5-ds-path.k5-small");
    const numbers = el("span.k5-ds-numbers");
    const bar = el("i");
    const line = el("div.k5-bar.k5-ds-scan", {}, bar);
    const notes = el("div.k5-ds-notes");
    const caches = K5.button(t("js.ds.to_caching"), () => K5.openTab("caching"), { icon: "right", kind: "plain" });
    const forget = K5.sureButton(t("js.ds.forget"), () => ctx.forget(), { icon: "close", kind: "plain", title: t("js.ds.forget_title") });
    const box = el("header.k5-ds-head", {},
      el("div.k5-ds-head-row", {}, el("div.k5-ds-name-block", {}, name, path), el("div.k5-tools", {}, caches, forget)),
      numbers, line, notes);
    let drawn = "";
    // How much is not cached stands on the button that leads there; the ledger itself is the Caching tab's.
    const showCaches = (ledger) => {
      const waiting = ledger && ledger.needs ? Math.max(0, ...Object.values(ledger.needs.pending || {}).filter(Number.isFinite)) : null;
      const text = waiting === null ? t("js.ds.to_caching") : waiting ? t("js.ds.to_caching_n", { n: ds.number(waiting) }) : t("js.ds.to_caching_done");
      set(caches.lastChild, text);
      caches.setAttribute("aria-label", text);
    };
    const summary = (detail) => {
      if (detail.scanning && !detail.scanned) return ds.scanning(detail.scanning);
      if (detail.items === null || detail.items === undefined) return "";
      const used = detail.entries.filter((entry) => entry.enabled);
      const sum = (key) => used.reduce((total, entry) => total + (entry[key] || 0), 0);
      return [
        ds.many("files", sum("sources")), ds.many("items", detail.items),
        detail.steps_per_epoch ? t("js.ds.steps", { n: ds.number(detail.steps_per_epoch) }) : "",
        sum("missing_captions") ? t("js.ds.no_caption_n", { n: ds.number(sum("missing_captions")) }) : "",
        sum("skipped") ? t("js.ds.skipped_n", { n: ds.number(sum("skipped")) }) : "",
        sum("excluded") ? t("js.ds.excluded_n", { n: ds.number(sum("excluded")) }) : "",
      ].filter(Boolean).join(" · ");
    };
    const show = (detail) => {
      set(name, detail.name);
      set(path, detail.path);
      path.title = detail.path;
      set(numbers, summary(detail));
      const scanning = detail.scanned ? null : detail.scanning; // a second look at what is known needs no words
      K5.toggle(line, "on", scanning);
      bar.style.width = scanning && scanning.total ? (100 * scanning.done) / scanning.total + "%" : "0";
      const mark = JSON.stringify([detail.problems, detail.notices]);
      if (mark === drawn) return;
      drawn = mark;
      const problems = detail.problems.map((problem) => el("li", {}, ds.sentence(problem)));
      const notices = detail.notices || [];
      notes.replaceChildren(...[
        problems.length ? el("div.k5-ds-trouble", { role: "alert" }, el("strong", {}, t("js.ds.not_usable")), el("ul", {}, problems),
          el("div.k5-tools", {}, K5.button(t("js.ds.view.setup"), () => ctx.open("setup")), K5.button(t("js.ds.view.toml"), () => ctx.open("toml"))) ) : null,
        notices.length ? el("details.k5-ds-notices", {}, el("summary", {}, ds.many("notices", notices.length)),
          el("ul", {}, notices.map((notice) => el("li", {}, typeof notice === "string" ? notice : ds.sentence(notice))))) : null,
      ].filter(Boolean));
    };
    return { box, show, showCaches };
  };

  const makeEmpty = (actions) => el("div.k5-empty.k5-ds-empty", { hidden: true },
    K5.icon("folder"), el("strong", {}, t("js.ds.empty_title")), el("p", {}, t("js.ds.empty_text")),
    el("div.k5-tools", {}, el("button.k5-start.k5-ds-go", { type: "button", onclick: actions.create }, t("js.ds.new")),
      K5.button(t("js.ds.open_toml"), actions.openFile, { icon: "file" })));

  // --- the tab ---------------------------------------------------------------------------------------------------
  K5.parts.dataset = (root, { server }) => {
    const was = kept();
    const state = { id: was.id || null, view: VIEWS.includes(was.view) ? was.view : "items", version: null, detail: null, list: [] };
    let at = 0;
    let busy = null;
    let ledgerAt = 0;
    const ctx = {
      root,
      id: () => state.id,
      detail: () => state.detail,
      path: (rest) => "datasets/" + encodeURIComponent(state.id) + rest,
      verb: (name, ...values) => ds.call(server, name, ...values),
      changed: () => refresh(true),
      current: null,
      seek: null, // what a view shall show when it opens: {bucket} or {only, text}
      setCurrent: (item) => {
        ctx.current = item;
      },
      open: (view, seek = null) => {
        ctx.seek = seek;
        openView(view);
      },
      count: (view, n) => tabs.count(view, n),
      forget: async () => {
        await ctx.verb("forget_dataset", state.id);
        state.id = null;
        refresh(true);
      },
    };
    const added = (answer) => {
      if (answer && answer.id) choose(answer.id);
      refresh(true);
    };
    const actions = {
      create: () => ds.newDialog(ctx, added),
      openFile: () => ds.openDialog(ctx, added),
    };
    const list = makeList((id) => choose(id), actions);
    const head = makeHead(ctx);
    const empty = makeEmpty(actions);
    const views = {};
    const viewBox = el("div.k5-ds-view", { id: "k5-ds-view", role: "tabpanel" });
    const tabs = ds.tabs(t("js.ds.views"), VIEWS, (name) => t("js.ds.view." + name), (name) => ctx.open(name));
    const main = el("div.k5-ds-main", { hidden: true }, head.box, tabs.box, viewBox);
    root.append(list.box, main, empty);

    const openView = (name) => {
      if (views[state.view] && state.view !== name && views[state.view].hide) views[state.view].hide();
      state.view = name;
      tabs.mark(name);
      keep({ id: state.id, view: name });
      viewBox.setAttribute("aria-labelledby", "k5-ds-tab-" + name);
      if (!state.detail) return;
      if (!views[name]) views[name] = ds.views[name](ctx);
      if (viewBox.firstChild !== views[name].box) viewBox.replaceChildren(views[name].box);
      views[name].update(state.detail, true);
    };
    const choose = (id) => {
      if (id === state.id && state.detail && state.detail.id === id) return;
      if (views[state.view] && views[state.view].hide) views[state.view].hide();
      state.id = id;
      state.detail = null;
      state.version = null;
      ctx.current = null;
      ctx.seek = null;
      ledgerAt = 0;
      head.showCaches(null);
      tabs.count("lint", 0);
      keep({ id, view: state.view });
      list.show(state.list, id);
      refresh(true);
    };
    const frame = () => {
      const none = state.list.length === 0;
      empty.hidden = !none;
      list.box.hidden = none;
      main.hidden = none || !state.detail;
      K5.toggle(root, "none", none);
    };
    const load = async () => {
      const before = state.id;
      const page = await K5.get("datasets");
      if (before !== state.id) return; // another one was chosen meanwhile; it asks by itself
      state.list = page.datasets;
      if (!page.datasets.some((dataset) => dataset.id === state.id)) {
        state.id = page.datasets.length ? page.datasets[0].id : null;
        state.detail = null;
      }
      list.show(page.datasets, state.id);
      const summary = page.datasets.find((dataset) => dataset.id === state.id);
      const stale = page.version !== state.version || !state.detail || (summary && summary.scanning) || state.detail.scanning;
      if (state.id && stale) {
        const asked = state.id;
        const detail = await K5.get("datasets/" + encodeURIComponent(asked));
        if (asked !== state.id) return;
        const fresh = !state.detail || page.version !== state.version;
        state.version = page.version;
        const first = !state.detail;
        state.detail = detail;
        frame();
        head.show(detail);
        if (first) openView(state.view);
        else if (fresh) views[state.view].update(detail, false);
      }
      frame();
      if (state.id && Date.now() - ledgerAt > LEDGER_WAIT) {
        ledgerAt = Date.now();
        const asked = state.id;
        const ledger = await K5.get("caching/" + encodeURIComponent(asked));
        if (asked === state.id) head.showCaches(ledger);
        if (!ledger.needs) ledgerAt = 0;
      }
      if (views[state.view] && views[state.view].tick) views[state.view].tick();
    };
    const refresh = async (now) => {
      if (!K5.shown(root)) return null;
      const moving = state.detail && state.detail.scanning;
      if (!now && Date.now() - at < (moving ? 900 : 2500)) return null;
      if (busy) return now ? busy.then(() => refresh(true)) : busy;
      at = Date.now();
      busy = load().catch(() => {
        at = 0; // the header says that the server is away; the next status asks again
      });
      await busy;
      busy = null;
      return null;
    };
    ctx.server = server;
    K5.on("status", (status) => status && refresh(false));
    K5.on("escape", () => K5.shown(root) && views[state.view] && views[state.view].escape && views[state.view].escape());
    new IntersectionObserver((entries) => entries[entries.length - 1].isIntersecting && refresh(true)).observe(root);
    tabs.mark(state.view);
    frame();
    empty.hidden = true; // until the first answer says that there is nothing
    refresh(true);
  };
})();
