/* The left half of the Training tab: the form, what it means, and the buttons that start it. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const { size } = K5.caching;
  const { makeField, makePair } = K5.trainFields;
  const { makeModel, makeDataset, makePresets, makeMore, makeResume, makePrompts, openImport } = K5.trainParts;
  const redraw = (node, value, make) => K5.caching.redraw(node, value, make);
  const DOUBLE_CLICK_MS = 800;

  // --- what the form comes to, and the buttons ----------------------------------------------------------------------
  const makeSummary = (actions) => {
    const text = el("div.k5-t-sum-text");
    const facts = el("div.k5-small.k5-t-facts");
    const problems = el("ul.k5-problems");
    const label = el("span", {}, t("js.train.start"));
    const start = el("button.k5-start", { type: "button", id: "k5-train-start", title: "Ctrl+Enter", onclick: () => actions.start(false) }, label, el("kbd", {}, "Ctrl ⏎"));
    const queue = K5.button(t("js.train.queue"), () => actions.start(true), { icon: "plus", title: t("js.train.queue_title") });
    queue.id = "k5-train-queue";
    const undo = K5.button(t("js.train.undo"), actions.undo, { kind: "plain", icon: "again", title: t("js.train.undo_title") });
    const tools = el("div.k5-tools.k5-t-tools", {},
      K5.button(t("js.train.command"), actions.copy, { icon: "copy", kind: "plain" }),
      K5.button(t("js.train.import"), actions.openImport, { icon: "down", kind: "plain", title: t("js.train.import_title") }),
      el("span.k5-grow"), undo, K5.sureButton(t("js.train.reset"), actions.reset, { kind: "plain" }));
    const box = el("section.k5-t-actions", { "aria-label": t("js.train.summary") }, text, facts, problems, el("div.k5-go", {}, start, queue), tools);
    const factsOf = (sum) => {
      const parts = [];
      if (sum.seconds) parts.push(t("js.train.time", { time: K5.seconds(sum.seconds), rate: K5.rate(sum.seconds_per_step) }));
      else if (sum.total_steps) parts.push(t("js.train.time_unknown"));
      if (sum.memory_bytes) parts.push(t("js.train.memory", { size: size(sum.memory_bytes) }));
      if (sum.disk_bytes !== null && sum.free_bytes !== null) {
        const short = sum.disk_bytes > sum.free_bytes;
        parts.push(el("span" + (short ? ".bad" : ""), {}, t(short ? "js.train.disk_short" : "js.train.disk", { size: size(sum.disk_bytes), free: size(sum.free_bytes) })));
      }
      return parts.flatMap((part, index) => (index ? [" · ", part] : [part]));
    };
    const plural = (n) => t("js.problem." + new Intl.PluralRules(K5.language).select(n));
    const update = (state, titles) => {
      const sum = state.summary;
      set(text, sum ? sum.text : "");
      text.hidden = !sum || !sum.text;
      redraw(facts, sum, () => (sum ? factsOf(sum) : []));
      const found = state.problems;
      set(label, found.length ? t("js.train.start_problems", { n: found.length, word: plural(found.length) }) : t("js.train.start"));
      K5.toggle(start, "blocked", found.length);
      undo.hidden = !state.undo;
      const title = (name) => (name === "sample_prompts" && state.prompts ? t("js.train.prompts") : titles[name] || name || "");
      redraw(problems, found, () => found.map((problem) => el("li", {},
        el("button.k5-link", { type: "button", onclick: () => actions.find(problem.field) }, title(problem.field)), " " + problem.message)));
    };
    return { box, update };
  };

  // --- the basic options --------------------------------------------------------------------------------------------
  const makeBasics = (specs, change) => {
    const single = ["output_name", "network_dim", "learning_rate"].map((name) => makeField(specs[name], change, { brief: true }));
    const units = { epochs: t("js.train.epochs"), steps: t("js.train.steps") };
    const pair = (key, epochs, steps, first) => makePair(t("js.train." + key), { epochs: specs[epochs], steps: specs[steps] }, units, change, first);
    const pairs = [pair("length", "max_train_epochs", "max_train_steps", "steps"), pair("save_every", "save_every_n_epochs", "save_every_n_steps", "epochs"),
      pair("sample_every", "sample_every_n_epochs", "sample_every_n_steps", "epochs")];
    const prompts = makePrompts(change);
    const box = el("div.k5-t-basics", {}, el("h3.k5-heading", {}, t("js.train.basics")), single[0].box,
      el("div.k5-t-two", {}, single[1].box, single[2].box), el("div.k5-t-two", {}, pairs[0].box, pairs[1].box), prompts.box, pairs[2].box);
    return { box, single, pairs, prompts };
  };

  // --- the tab ------------------------------------------------------------------------------------------------------
  K5.parts["training-form"] = (root, { server }) => {
    let built = null;
    let state = null;
    const started = { true: 0, false: 0 };
    let turn = 0; // grows with every change, so that an older answer is not shown over a newer wish
    let line = Promise.resolve(); // changes reach the server one after the other
    const changed = (name, ...values) => {
      turn += 1;
      line = line.then(() => K5.ask(server, name, ...values)).then((answer) => {
        turn += 1;
        refresh();
        return answer;
      });
      return line;
    };
    const change = (name, value) => changed("set_train", name, value === undefined ? null : value);
    const flush = () => {
      if (!built) return;
      for (const field of built.fields) field.flush();
      for (const pair of built.basics.pairs) pair.flush();
      built.basics.prompts.flush();
    };
    const announce = (answer) => {
      if (answer && answer.problems) K5.notice(answer.problems.map((problem) => problem.message).join("\n"), "bad");
      return answer;
    };
    const actions = {
      change,
      dataset: (id) => {
        K5.emit("dataset", id);
        change("dataset", id);
      },
      preset: (id) => changed("preset_train", id),
      resume: (what) => changed("resume_train", what).then(announce),
      clone: (run) => changed("clone_train", run).then(announce),
      reset: () => changed("reset_train"),
      undo: () => changed("undo_train"),
      openImport: () => openImport(root, (text) => changed("import_train", text)),
      copy: () => {
        if (!state || !state.command) return;
        K5.copy(state.command);
        if (state.prompts.trim()) K5.notice(t("js.train.command_prompts"));
      },
      start: async (queue) => {
        if (Date.now() - started[queue] < DOUBLE_CLICK_MS) return; // a double click is one wish
        started[queue] = Date.now();
        flush();
        const name = (state && state.values.output_name) || "k5_lora";
        const answer = await changed("start_train", { queue });
        if (answer && answer.problems) {
          announce(answer);
          if (answer.problems[0]) actions.find(answer.problems[0].field);
        } else if (answer && answer.run) {
          K5.notice(t(queue ? "js.train.queued" : "js.train.started", { name }));
          if (!queue) document.dispatchEvent(new CustomEvent("k5-training-run", { detail: { run: answer.run } }));
        }
      },
      find: (name) => {
        const field = place(name);
        if (!field) return;
        built.more.open(name);
        built.model.open(name);
        field.box.scrollIntoView({ block: "center" });
        if (field.focus) field.focus();
      },
    };
    const place = (name) => {
      if (!built) return null;
      if (name === "dataset_config" || name === "cache_missing") return built.dataset;
      if (name === "resume") return built.resume;
      if (name === "sample_prompts" && state.values.sample_prompts === undefined) return built.basics.prompts;
      return built.fields.find((field) => field.spec.name === name) || built.basics.pairs.find((pair) => pair.names.includes(name)) || null;
    };

    const build = (form) => {
      const specs = Object.fromEntries(form.specs.map((spec) => [spec.name, spec]));
      const model = makeModel(specs, change);
      const dataset = makeDataset(actions);
      const presets = makePresets(form.presets, actions.preset);
      const basics = makeBasics(specs, change);
      const resume = makeResume(actions);
      const more = makeMore(form.specs, form.groups, change);
      const summary = makeSummary(actions);
      const titles = Object.fromEntries(form.specs.map((spec) => [spec.name, spec.label]));
      root.replaceChildren(el("div.k5-t-form", {}, model.box, dataset.box,
        el("section.k5-card.k5-t-section", {}, presets.box, basics.box, resume.box), more.box), summary.box);
      return { model, dataset, presets, basics, resume, more, summary, titles, fields: [...model.fields, ...basics.single, ...more.fields] };
    };
    const draw = () => {
      const by = {};
      for (const problem of state.problems) (by[problem.field] = by[problem.field] || []).push(problem.message);
      for (const field of built.fields) {
        field.show(state.values[field.spec.name]);
        field.complain(by[field.spec.name] || []);
      }
      for (const pair of built.basics.pairs) {
        pair.show(state.values);
        pair.complain(pair.names.flatMap((name) => by[name] || []));
      }
      for (const part of [built.model, built.dataset, built.presets, built.basics.prompts, built.resume, built.more]) part.update(state);
      built.summary.update(state, built.titles);
    };

    let asking = false;
    let again = false;
    let later = 0;
    const refresh = async () => {
      again = again || asking;
      if (asking || !K5.shown(root)) return;
      asking = true;
      clearTimeout(later);
      const asked = turn;
      try {
        const found = await K5.get(built ? "training/state" : "training/form");
        if (!built) built = build(found);
        if (asked === turn) {
          state = found;
          draw();
        } else again = true;
        if (found.dataset && found.dataset.checking) later = setTimeout(refresh, 500);
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
    K5.on("dataset", (id) => state && (!state.dataset || state.dataset.id !== id) && change("dataset", id));
    K5.on("start", () => K5.shown(root) && actions.start(false));
    // Other parts of the page may ask for a run's settings, or to go on from it.
    const taken = (action) => (event) => {
      const what = event.detail && (event.detail.path || event.detail.run);
      if (!what) return;
      K5.openTab("training");
      action(what);
    };
    document.addEventListener("k5-training-clone", taken(actions.clone));
    document.addEventListener("k5-training-resume", taken(actions.resume));
    refresh();
  };
})();
