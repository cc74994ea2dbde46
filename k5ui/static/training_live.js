/* The live view of a training: progress, requests, curves, time budget, samples, checkpoints, log. It stands in the
   Training tab and, for a training that is opened there, in Runs. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const BUDGET = ["train", "sample", "validate", "save", "load"];

  const size = (bytes) => (bytes === null || bytes === undefined ? "" : bytes >= 1e9 ? t("js.live.gigabytes", { n: (bytes / 1e9).toFixed(2) }) : t("js.live.megabytes", { n: (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0) }));

  const makeHead = () => {
    const state = el("span");
    const bar = el("i");
    const facts = el("div.k5-live-facts");
    const doing = el("div.k5-numbers.k5-grow", { role: "status" });
    const cells = Object.fromEntries(["step", "epoch", "loss", "rate", "left"].map((name) => [name, el("b")]));
    for (const [name, node] of Object.entries(cells)) facts.append(el("div", {}, node, el("span", {}, t("js.live.fact." + name))));
    const box = el("div.k5-live-head", {}, facts, el("div.k5-bar", {}, bar), el("div.k5-row", {}, state, doing));
    let known = "";
    const show = (page, smooth) => {
      const active = K5.running(page.state);
      if (known !== page.state) {
        known = page.state;
        state.replaceChildren(el("span.k5-state." + page.state, {}, K5.stateName(page.state)));
      }
      const of = (n, total) => (n === null || n === undefined ? "–" : K5.count(n) + (total ? " / " + K5.count(total) : ""));
      set(cells.step, of(page.step, page.total));
      set(cells.epoch, of(page.epoch, page.epochs));
      set(cells.loss, K5.figures(smooth === null ? page.loss : smooth));
      set(cells.rate, page.seconds_per_step ? K5.rate(page.seconds_per_step) : "–");
      set(cells.left, active ? K5.seconds(page.remaining_seconds) || "–" : K5.seconds(page.seconds) || "–");
      set(cells.left.nextSibling, t(active ? "js.live.fact.left" : "js.live.fact.took"));
      bar.style.width = (page.state === "finished" ? 100 : K5.percent(page)) + "%";
      set(doing, describe(page));
    };
    const describe = (page) => {
      if (page.killing) return t("js.live.killing");
      if (page.state === "queued") return page.queue_position === null ? page.message : t("js.live.waits", { n: page.queue_position + 1 });
      const asked = (page.requests || []).map((name) => t("js.live.asked." + name));
      const skipped = page.skipped ? t("js.live.skipped", { n: page.skipped }) : "";
      if (!K5.running(page.state)) return [page.state === "finished" || page.problems.length ? "" : page.message, skipped].filter(Boolean).join(" · ");
      const phase = page.state === "running" || page.state === "stopping" ? K5.phaseName(page) : K5.stateName(page.state);
      return [phase, ...asked, skipped].filter(Boolean).join(" · ");
    };
    return { box, show };
  };

  // The buttons follow the state that the server computes and what has been asked for already.
  const makeRequests = (act) => {
    const box = el("div.k5-tools.k5-requests");
    let drawn = "";
    const show = (page) => {
      const asked = new Set(page.requests || []);
      const active = K5.running(page.state);
      const mark = JSON.stringify([page.id, page.state, [...asked], page.killing, page.step === null, page.queue_position === null]);
      if (mark === drawn) return;
      drawn = mark;
      const button = (name, options, off) => {
        const made = (options.sure ? K5.sureButton : K5.button)(t("js.live.do." + name), () => act(name), { title: t("js.live.do." + name + "_title"), ...options });
        made.disabled = Boolean(off);
        if (asked.has(name)) made.classList.add("on");
        return made;
      };
      const early = page.state === "starting" || page.step === null;
      const leaving = asked.has("stop") || asked.has("stop_and_save") || page.killing;
      box.replaceChildren(...(active ? [
        button("sample", { icon: "film" }, asked.has("sample") || leaving || early),
        button("save", { icon: "down" }, asked.has("save") || leaving || early),
        el("span.k5-grow"),
        button("stop_and_save", { icon: "stop" }, leaving),
        button("stop_after_epoch", { kind: "plain" }, asked.has("stop_after_epoch") || leaving || early),
        button("stop", { kind: "plain", sure: true }, asked.has("stop") || page.killing),
        button("kill", { kind: "plain", sure: true }, page.killing),
      ] : page.state === "queued" ? [page.queue_position === null ? button("clone", { icon: "copy" }) : button("dequeue", { icon: "close" })] : [
        button("resume", { icon: "play" }),
        button("clone", { icon: "copy", kind: "plain" }),
      ]));
    };
    return { box, show };
  };

  const makeBudget = () => {
    const bar = el("div.k5-budget-bar");
    const key = el("div.k5-budget-key");
    const parts = Object.fromEntries(BUDGET.map((name) => [name, { bar: el("i", { style: "background:var(--k5-budget-" + name + ")" }), text: el("span") }]));
    for (const name of BUDGET) {
      bar.append(parts[name].bar);
      key.append(el("span.k5-budget-part", {}, el("i", { style: "background:var(--k5-budget-" + name + ")" }), parts[name].text));
    }
    const box = el("section.k5-card", { "aria-label": t("js.live.budget") }, el("h3.k5-card-title", {}, t("js.live.budget")), bar, key);
    const show = (budget) => {
      const all = BUDGET.reduce((sum, name) => sum + (budget[name] || 0), 0);
      for (const name of BUDGET) {
        const share = all ? (budget[name] || 0) / all : 0;
        parts[name].bar.style.width = (share * 100).toFixed(2) + "%";
        set(parts[name].text, t("js.live.budget." + name) + " " + Math.round(share * 100) + " % · " + (K5.seconds(budget[name] || 0)));
        parts[name].text.parentNode.hidden = !budget[name];
      }
    };
    return { box, show };
  };

  const makeCheckpoints = ({ generate, resume }) => {
    const body = el("tbody");
    const empty = el("p.k5-muted", {}, t("js.live.no_checkpoints"));
    const head = ["step", "name", "size", "when", "do"].map((name) => el("th." + name, { scope: "col" }, t("js.live.col." + name)));
    const table = el("table.k5-table.k5-checkpoints", {}, el("thead", {}, el("tr", {}, head)), body);
    const box = el("section.k5-card", { "aria-label": t("js.live.checkpoints") }, el("h3.k5-card-title", {}, t("js.live.checkpoints")), empty, el("div.k5-scroll", {}, table));
    const show = (rows) => {
      empty.hidden = rows.length > 0;
      table.hidden = !rows.length;
      body.replaceChildren(...rows.slice(0, 200).map((row) => el("tr", {},
        el("td.step", {}, K5.count(row.step)),
        el("td.name", { title: row.path }, el("span", {}, row.name), el("small.k5-muted", {}, t("js.live.kind." + row.kind) + (row.why ? " · " + t("js.live.why." + row.why) : ""))),
        el("td.size", {}, size(row.bytes)), el("td.when", {}, K5.moment(row.t)),
        el("td.do", {}, row.kind === "lora"
          ? K5.button(t("js.live.generate_with"), () => generate(row), { icon: "film", kind: "plain", title: t("js.live.generate_with_title") })
          : K5.button(t("js.live.resume_here"), () => resume(row), { icon: "play", kind: "plain", title: t("js.live.resume_here_title") })))));
    };
    return { box, show };
  };

  const makeLogCard = () => {
    const log = K5.makeLog();
    let offset = 0;
    let run = null;
    const box = el("details.k5-card.k5-log-card", {}, el("summary", {}, t("js.log")), log.box);
    const refresh = async () => {
      if (!run || !box.open) return;
      const asked = run;
      for (let round = 0; round < 8; round += 1) {
        const page = await K5.get("runs/" + encodeURIComponent(asked) + "/log?offset=" + (offset || -65536));
        if (asked !== run) return;
        if (page.text) log.add(page.text);
        offset = page.offset;
        if (page.offset >= page.size) return;
      }
    };
    box.addEventListener("toggle", () => refresh().catch(() => {})); // the next poll asks again
    return { box, refresh, open: (id) => {
      run = id;
      offset = 0;
      log.clear();
    } };
  };

  // `ask(verb, ...values)` calls a verb of the server; `trigger` fires an event of the part that this stands in.
  K5.trainingLive = ({ ask, trigger }) => {
    let run = null;
    let chain = false;
    let version = "";
    let page = null;
    let busy = false;
    let timer = 0;
    let failures = 0;
    const act = async (name) => {
      const id = run;
      if (name === "resume" || name === "clone") await hand([name + "_train", id]);
      else if (name === "kill" || name === "dequeue") await ask(name, id);
      else await ask("ask_train", id, name);
      tick(true);
    };
    // Resuming and cloning fill the form of the Training tab, which is kept by the server.
    const hand = async (...calls) => {
      for (const [name, value] of calls) {
        const answer = await ask(name, value);
        if (!answer || answer.error) return;
        if (answer.problems && answer.problems.length) {
          K5.notice(answer.problems.map((problem) => problem.message).join("\n"), "bad");
          return;
        }
      }
      K5.openTab("training");
      const form = document.getElementById("k5-training-form");
      if (form) form.scrollIntoView({ block: "start", behavior: "smooth" });
    };
    const head = makeHead();
    const requests = makeRequests(act);
    const chart = K5.trainingChart();
    const budget = makeBudget();
    const samples = K5.sampleGrid();
    const checkpoints = makeCheckpoints({
      generate: (row) => {
        trigger("lora", { run: row.run, saved: row.path }); // Gradio takes a "path" for an upload
        K5.openTab("generate");
      },
      resume: (row) => hand(["clone_train", row.run], ["resume_train", row.path]),
    });
    const log = makeLogCard();
    const troubles = el("div.k5-troubles");
    const chainBox = el("input", { type: "checkbox", onchange: () => {
      chain = chainBox.checked;
      version = "";
      chart.open(run, chain);
      tick(true);
    } });
    const chainText = el("span");
    const chainLine = el("label.k5-chain", { hidden: true }, chainBox, chainText);
    const box = el("div.k5-training-view", {}, el("section.k5-card.k5-live-card", {}, head.box, requests.box, troubles, chainLine),
      chart.box, samples.box, budget.box, checkpoints.box, log.box);

    new ResizeObserver(() => K5.toggle(box, "narrow", box.clientWidth < 600)).observe(box);

    const sayTroubles = () => {
      const sentence = (item) => (typeof item === "string" ? item : item.field ? item.field + ": " + item.message : item.message);
      const bad = [...(page.problems || []), ...(!(page.problems || []).length && ["failed", "crashed", "interrupted"].includes(page.state) && page.message ? [page.message] : [])];
      const warnings = page.warnings || [];
      const mark = JSON.stringify([bad, warnings]);
      if (troubles.dataset.mark === mark) return;
      troubles.dataset.mark = mark;
      troubles.replaceChildren(...bad.map((item) => el("p.k5-trouble.bad", {}, sentence(item))),
        ...(warnings.length ? [el("details", {}, el("summary", {}, t("js.live.notes", { n: warnings.length })), warnings.map((item) => el("p.k5-trouble", {}, sentence(item))))] : []));
    };
    const sayChain = () => {
      const earlier = (page.attempts || []).length - 1;
      chainLine.hidden = earlier < 1;
      const last = (page.attempts || [])[earlier];
      set(chainText, earlier < 1 ? "" : t("js.live.chain", { n: earlier, step: last && last.after !== null ? K5.count(last.after) : "–" }));
    };
    const show = (answer) => {
      page = answer;
      if (answer.checkpoints) {
        checkpoints.show(answer.checkpoints);
        samples.show(answer.samples, answer.prompts);
        chart.setMarks(answer.marks);
      }
      version = answer.version;
      requests.show(answer);
      budget.show(answer.budget);
      samples.say(t(K5.running(answer.state) || answer.state === "queued" ? "js.live.samples_wait" : "js.live.samples_none"));
      sayTroubles();
      sayChain();
    };
    const tick = async (now) => {
      clearTimeout(timer);
      if (busy) {
        timer = setTimeout(() => tick(now), 80);
        return;
      }
      let wait = 500;
      if (run && K5.shown(box)) {
        busy = true;
        const asked = run;
        try {
          const parameters = new URLSearchParams({ version, chain });
          const [answer, read] = await Promise.all([K5.get("live/" + encodeURIComponent(asked) + "?" + parameters), chart.refresh(false), log.refresh()]);
          if (asked === run) {
            show(answer);
            head.show(answer, chart.smooth());
            chart.wait(answer.read < 1 ? t("js.live.reading", { n: Math.round(answer.read * 100) }) : t(K5.running(answer.state) || answer.state === "queued" ? "js.live.first_step" : "js.live.no_steps"));
            wait = read < 1 ? 60 : K5.running(answer.state) ? 600 : 3000;
          }
          failures = 0;
        } catch (error) {
          failures += 1;
          wait = Math.min(5000, 1000 * failures); // the header says that the server is away
          if (String(error.message).endsWith("404") && asked === run) K5.emit("training-gone", run);
        }
        busy = false;
      }
      timer = setTimeout(tick, wait);
    };
    tick();
    return {
      box,
      run: () => run,
      offer: (runs) => chart.offer(runs),
      open: (id) => {
        if (id === run) return tick(true);
        run = id;
        version = "";
        page = null;
        chain = chainBox.checked = false;
        delete troubles.dataset.mark;
        samples.clear();
        checkpoints.show([]);
        chart.open(id, false);
        log.open(id);
        return tick(true);
      },
    };
  };

  // The right side of the Training tab: which training, or what to do when there is none.
  K5.parts["training-live"] = (root, { server, trigger }) => {
    let trainings = [];
    let follow = true; // show what is at work until somebody chooses another one
    let seen = null;
    let asking = false;
    const view = K5.trainingLive({ ask: (name, ...values) => K5.ask(server, name, ...values), trigger });
    const chosen = el("select.k5-input", { "aria-label": t("js.live.which"), onchange: () => {
      follow = false;
      open(chosen.value);
    } });
    const bar = el("div.k5-row.k5-which", {}, chosen, K5.button(t("js.live.compare_runs"), () => K5.compareRuns(view.run(), trainings), { kind: "plain" }));
    const empty = el("div.k5-empty.k5-card", {}, K5.icon("film"), el("strong", {}, t("js.live.empty_title")), el("span", {}, t("js.live.empty_text")),
      K5.button(t("js.live.to_dataset"), () => K5.openTab("dataset"), {}));
    root.append(bar, empty, view.box);
    const open = (id) => {
      view.open(id);
      chosen.value = id || "";
      view.offer(trainings);
    };
    const draw = () => {
      const none = !trainings.length;
      empty.hidden = !none;
      bar.hidden = view.box.hidden = none;
      const rows = trainings.map((run) => [run.id, run.title + " · " + K5.stateName(run.state) + " · " + K5.moment(run.created)]);
      const mark = JSON.stringify(rows);
      if (chosen.dataset.mark !== mark) {
        chosen.dataset.mark = mark;
        chosen.replaceChildren(...rows.map(([id, text]) => el("option", { value: id }, text)));
        view.offer(trainings);
      }
      const current = trainings.find((run) => run.id === view.run());
      const working = trainings.find((run) => K5.running(run.state));
      K5.toggle(root, "working", working);
      const wanted = (follow && working) || current || working || trainings[0];
      if (wanted && wanted.id !== view.run()) open(wanted.id);
      else if (wanted && chosen.value !== wanted.id) chosen.value = wanted.id;
    };
    const refresh = async () => {
      if (asking || !K5.shown(root)) return;
      const version = K5.status ? K5.status.version : null;
      if (seen !== null && seen === version) return;
      asking = true;
      try {
        trainings = (await K5.get("live")).trainings;
        seen = version;
        draw();
      } catch (error) {
        seen = null; // the header says that the server is away; the next status asks again
      }
      asking = false;
    };
    document.addEventListener("k5-training-run", (event) => {
      follow = true;
      seen = null;
      if (event.detail && event.detail.run && trainings.some((run) => run.id === event.detail.run)) open(event.detail.run);
      K5.poke();
    });
    K5.on("training-gone", () => {
      seen = null;
      follow = true;
    });
    K5.on("status", refresh);
    draw();
    refresh();
  };
})();
