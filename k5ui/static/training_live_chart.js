/* The curves of a training: loss (raw, smoothed, validation, earlier runs), learning rate, gradient norm, loss by band of
   noise, memory. Rows come from api/live/{run}/series; only the end of what is shown is fetched and replaced. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const SINGLE = ["loss", "lr", "grad_norm", "memory"];
  const OVERLAYS = 6;
  const RANGES = ["0–0.2", "0.2–0.4", "0.4–0.6", "0.6–0.8", "0.8–1"];

  const emptyStore = () => ({ key: "", rows: 0, step: [], smooth: [], loss: [], lr: [], grad_norm: [], memory: [], bands: [[], [], [], [], []], first: 0, last: 1, validation: { step: [], loss: [] }, validations: -1 });
  // Puts an answer of the server behind what is kept; both sides are bounded by what a chart can draw.
  const take = (store, answer) => {
    const cut = answer.reset ? 0 : K5.lowerBound(store.step, answer.from);
    const cutSmooth = answer.reset ? 0 : K5.lowerBound(store.step, answer.smooth_from);
    const put = (list, more, at) => {
      list.length = Math.min(list.length, at);
      for (const value of more) list.push(value);
    };
    put(store.step, answer.step, cut);
    put(store.smooth, answer.smooth, cutSmooth);
    for (const name of SINGLE) put(store[name], answer[name], cut);
    answer.bands.forEach((band, index) => put(store.bands[index], band, cut));
    if (answer.validation) store.validation = answer.validation;
    Object.assign(store, { key: answer.key, rows: answer.rows, validations: answer.validations });
    if (answer.last !== null) Object.assign(store, { first: answer.first, last: answer.last });
  };

  const low = (list, from, to) => {
    let best = Infinity;
    for (let i = from; i < to; i += 1) if (list[i] !== null && list[i] < best) best = list[i];
    return best;
  };
  const high = (list, from, to) => {
    let best = -Infinity;
    for (let i = from; i < to; i += 1) if (list[i] !== null && list[i] > best) best = list[i];
    return best;
  };

  const makeReadout = (choices) => {
    const box = el("div.k5-readout");
    const cells = {};
    const cell = (name, label, style, chosen) => {
      const value = el("b");
      const swatch = style ? el("i", { style }) : null;
      const node = chosen
        ? el("button.k5-read", { type: "button", "aria-pressed": String(choices[name]), title: t("js.live.toggle"), onclick: () => {
          choices[name] = !choices[name];
          node.setAttribute("aria-pressed", String(choices[name]));
          chosen();
        } }, swatch, el("span", {}, label), value)
        : el("span.k5-read", {}, swatch, el("span", {}, label), value);
      cells[name] = value;
      box.append(node);
      return node;
    };
    return { box, cell, say: (name, text) => set(cells[name], text) };
  };

  K5.trainingChart = () => {
    let run = null;
    let chain = false;
    let store = emptyStore();
    let marks = [];
    let busy = null;
    let again = false;
    let fetchTimer = 0;
    let cursor = null;
    const overlays = new Map(); // run id -> {title, store, slot, alive}
    const choices = { loss: true, smooth: true, validation: true };
    const look = { log: false, clip: true, smoothing: 2 };

    const group = K5.chartGroup({
      whole: () => [store.first, store.last],
      onView: () => {
        sayZoom();
        clearTimeout(fetchTimer);
        fetchTimer = setTimeout(() => refresh(true), 120);
      },
      onCursor: (step) => {
        if (step === cursor) return;
        cursor = step;
        sayValues();
      },
    });
    // --- the y range of the loss: what a person wants to see, without single steps that lie far out
    const limits = () => {
      const [from, to] = group.range();
      const [a, b] = [K5.lowerBound(store.step, from), K5.lowerBound(store.step, to + 1)];
      let bottom = Infinity;
      let top = -Infinity;
      const see = (less, more) => {
        if (less < bottom) bottom = less;
        if (more > top) top = more;
      };
      if (choices.smooth) see(low(store.smooth, a, b), high(store.smooth, a, b));
      if (choices.validation) {
        const v = store.validation;
        const [c, d] = [K5.lowerBound(v.step, from), K5.lowerBound(v.step, to + 1)];
        see(low(v.loss, c, d), high(v.loss, c, d));
      }
      for (const other of overlays.values()) {
        const [c, d] = [K5.lowerBound(other.store.step, from), K5.lowerBound(other.store.step, to + 1)];
        see(low(other.store.smooth, c, d), high(other.store.smooth, c, d));
      }
      if (choices.loss) {
        const raw = store.loss.slice(a, b).filter((value) => value !== null).sort((x, y) => x - y);
        if (raw.length) {
          const edge = look.clip ? Math.floor(raw.length * 0.03) : 0;
          see(raw[edge], raw[raw.length - 1 - edge]);
        }
      }
      if (look.log && bottom <= 0) bottom = Math.max(top, 1e-6) / 1000;
      return bottom <= top ? [bottom, top] : [null, null];
    };

    const loss = K5.chartPane(group, { label: t("js.live.loss_chart"), height: 280, lines: [], format: K5.short, limits, marks: () => marks, log: () => look.log, ticks: 5 });
    const small = (label, lines, format) => {
      const pane = K5.chartPane(group, { label, height: 112, lines, format, ticks: 2 });
      const value = el("b");
      return { pane, value, box: el("figure.k5-small-pane", {}, el("figcaption", {}, el("span", {}, label), value), pane.box) };
    };
    const rate = small(t("js.live.lr"), [{ label: "lr", colour: "--k5-link", width: 1.5 }], K5.short);
    const norm = small(t("js.live.grad_norm"), [{ label: "norm", colour: "--k5-link", alpha: 0.8 }], K5.short);
    const bands = small(t("js.live.bands"), RANGES.map((name, index) => ({ label: name, colour: "--k5-band-" + index, width: 1.25 })), K5.short);
    const memory = small(t("js.live.memory"), [{ label: "memory", colour: "--k5-link", width: 1.5 }], (value) => (value / 1e9).toFixed(value < 1e10 ? 2 : 1));
    bands.box.querySelector("figcaption").append(el("span.k5-band-key", { title: t("js.live.bands_help") }, RANGES.map((name, index) => el("span", {}, el("i", { style: "background:var(--k5-band-" + index + ")" }), name))));
    bands.value.hidden = true;

    // --- what stands around
    const readout = makeReadout(choices);
    readout.cell("step", t("js.live.step"));
    readout.cell("loss", t("js.live.loss"), "background:var(--k5-accent);opacity:.4", () => draw());
    readout.cell("smooth", t("js.live.smooth"), "background:var(--k5-accent)", () => draw());
    readout.cell("validation", t("js.live.validation"), "background:var(--k5-ok)", () => draw());
    const marked = el("span.k5-read.k5-marked");
    readout.box.append(marked);
    const press = (label, title, on, action) => {
      const button = K5.button(label, () => {
        action();
        button.classList.toggle("on", on());
        button.setAttribute("aria-pressed", String(on()));
      }, { kind: "chip" + (on() ? " on" : ""), title });
      button.setAttribute("aria-pressed", String(on()));
      return button;
    };
    const smoothing = el("input.k5-slider", { type: "range", min: "0", max: "4", step: "1", value: "2", "aria-label": t("js.live.smoothing"), title: t("js.live.smoothing"), onchange: () => {
      look.smoothing = Number(smoothing.value);
      refresh(true);
    } });
    const zoomAll = K5.button(t("js.live.all"), () => group.reset(), { kind: "chip", title: t("js.live.all_title") });
    const overlayMenu = el("div.k5-overlay-list");
    const overlayPlace = el("details.k5-overlays", {}, el("summary.k5-chip", {}, t("js.live.overlay")), overlayMenu);
    document.addEventListener("pointerdown", (event) => overlayPlace.open && !overlayPlace.contains(event.target) && (overlayPlace.open = false));
    overlayPlace.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      overlayPlace.open = false;
    });
    const overlayKey = el("div.k5-overlay-key");
    const bar = el("div.k5-tools.k5-chart-tools", {},
      press(t("js.live.log"), t("js.live.log_title"), () => look.log, () => ((look.log = !look.log), draw())),
      press(t("js.live.clip"), t("js.live.clip_title"), () => look.clip, () => ((look.clip = !look.clip), draw())),
      el("label.k5-smoothing", {}, el("span", {}, t("js.live.smoothing")), smoothing),
      overlayPlace, el("span.k5-grow"),
      K5.button("−", () => group.zoom(2), { kind: "chip", title: t("js.live.zoom_out") }),
      K5.button("+", () => group.zoom(0.5), { kind: "chip", title: t("js.live.zoom_in") }), zoomAll);
    const waiting = el("div.k5-chart-wait", { hidden: true });
    const box = el("section.k5-card.k5-curves", { "aria-label": t("js.live.curves") }, bar, readout.box, el("div.k5-chart-place", {}, loss.box, waiting), overlayKey,
      el("div.k5-small-panes", {}, rate.box, norm.box, bands.box, memory.box));

    const sayZoom = () => {
      zoomAll.disabled = !group.zoomed();
    };
    sayZoom();
    const value = (list, index) => (index >= 0 && index < list.length ? list[index] : null);
    const sayValues = () => {
      const at = cursor === null ? store.step.length - 1 : K5.nearest(store.step, cursor);
      const step = value(store.step, at);
      readout.say("step", step === null || step === undefined ? "–" : K5.count(step));
      readout.say("loss", K5.figures(value(store.loss, at)));
      readout.say("smooth", K5.figures(value(store.smooth, at)));
      const v = store.validation;
      const near = v.step.length && step !== null ? (cursor === null ? v.step.length - 1 : K5.nearest(v.step, step)) : -1;
      readout.say("validation", near >= 0 ? K5.figures(v.loss[near]) + (v.step[near] === step ? "" : " @ " + K5.count(v.step[near])) : "–");
      set(rate.value, K5.figures(value(store.lr, at), 4));
      set(norm.value, K5.figures(value(store.grad_norm, at)));
      const bytes = value(store.memory, at);
      set(memory.value, bytes === null ? "–" : t("js.live.gigabytes", { n: (bytes / 1e9).toFixed(2) }));
      const [from, to] = group.range();
      const reachable = (to - from) / 90;
      const kinds = cursor === null ? [] : [...new Set(marks.filter(([step]) => Math.abs(step - cursor) < reachable).map(([step, kind]) => t("js.live.mark." + kind) + " @ " + K5.count(step)))];
      set(marked, kinds.slice(0, 2).join(", "));
    };

    const draw = () => {
      const nothing = store.step.length === 0;
      K5.toggle(box, "nothing", nothing);
      const tables = [[store.step, choices.loss ? store.loss : store.step.map(() => null), choices.smooth ? store.smooth : store.step.map(() => null)]];
      const lines = [
        { label: "loss", colour: "--k5-accent", alpha: 0.28 },
        { label: "smooth", colour: "--k5-accent", width: 2 },
      ];
      if (store.validation.step.length) {
        tables.push([store.validation.step, choices.validation ? store.validation.loss : store.validation.step.map(() => null)]);
        lines.push({ label: "validation", colour: "--k5-ok", width: 1.5, points: store.validation.step.length <= 60 });
      }
      for (const other of overlays.values()) {
        if (!other.store.step.length) continue;
        tables.push([other.store.step, other.store.smooth]);
        lines.push({ label: other.title, colour: "--k5-run-" + other.slot, width: 1.5 });
      }
      loss.set(tables.length === 1 ? tables[0] : uPlot.join(tables), lines);
      rate.pane.set([store.step, store.lr]);
      norm.pane.set([store.step, store.grad_norm]);
      bands.pane.set([store.step, ...store.bands]);
      memory.pane.set([store.step, store.memory]);
      sayValues();
      sayZoom();
    };

    // --- fetching
    const query = (kept, points) => {
      const values = { since: kept.rows, key: kept.key, points, smoothing: look.smoothing, chain, validations: kept.validations };
      if (group.zoomed()) {
        const [from, to] = group.range();
        Object.assign(values, { first: Math.max(0, Math.floor(from)), last: Math.ceil(to) });
      }
      return new URLSearchParams(values).toString();
    };
    const points = () => Math.max(200, Math.min(2000, Math.round((loss.box.clientWidth || 640) * 2)));
    const ask = (id, kept, count) => K5.get("live/" + encodeURIComponent(id) + "/series?" + query(kept, count));
    // Returns the share of the journal that the server has read. `fresh` asks anew although a poll is under way.
    const refresh = async (fresh) => {
      if (!run) return 1;
      if (busy) {
        again = again || fresh;
        return busy;
      }
      const asked = run;
      busy = (async () => {
        const mark = JSON.stringify(group.zoomed() ? group.range() : null);
        const answers = [ask(asked, store, points())];
        const seen = mark + look.smoothing;
        for (const [id, other] of overlays) {
          if (!other.alive && !fresh && other.read >= 1 && other.mark === seen) continue;
          const added = ask(id, other.store, 1000).then((answer) => {
            Object.assign(other, { mark: seen, read: answer.read });
            take(other.store, answer);
          }, () => overlays.delete(id)); // it is gone
          answers.push(added);
        }
        const answer = await answers[0];
        await Promise.all(answers);
        const still = asked === run && mark === JSON.stringify(group.zoomed() ? group.range() : null);
        if (still) {
          take(store, answer);
          draw();
        }
        return answer.read;
      })();
      try {
        return await busy;
      } finally {
        busy = null;
        if (again) {
          again = false;
          setTimeout(() => refresh(true).catch(() => {}), 0); // a poll that fails is repeated by the next one
        }
      }
    };

    const offer = (runs) => {
      overlayMenu.replaceChildren(...runs.filter((other) => other.id !== run).slice(0, 100).map((other) => {
        const input = el("input", { type: "checkbox", checked: overlays.has(other.id), onchange: () => {
          if (!input.checked) overlays.delete(other.id);
          else {
            const used = new Set([...overlays.values()].map((item) => item.slot));
            const slot = [...Array(OVERLAYS).keys()].find((n) => !used.has(n));
            if (slot === undefined) {
              input.checked = false;
              K5.notice(t("js.live.overlay_most", { n: OVERLAYS }));
              return;
            }
            overlays.set(other.id, { title: other.title, store: emptyStore(), slot, alive: K5.running(other.state), read: 0, mark: "" });
          }
          sayOverlays();
          draw();
          refresh(true);
        } });
        return el("label", {}, input, el("span", {}, other.title), el("small", {}, K5.moment(other.created)));
      }));
      if (!overlayMenu.children.length) overlayMenu.append(el("p.k5-muted", {}, t("js.live.overlay_none")));
    };
    const sayOverlays = () => overlayKey.replaceChildren(...[...overlays.values()].map((other) => el("span", {}, el("i", { style: "background:var(--k5-run-" + other.slot + ")" }), other.title)));

    return {
      box,
      refresh,
      offer,
      smooth: () => (store.smooth.length ? store.smooth[store.smooth.length - 1] : null), // the last value
      setMarks: (list) => {
        marks = list;
        loss.redraw();
      },
      wait: (text) => {
        waiting.hidden = store.step.length > 0;
        set(waiting, text);
      },
      open: (id, withChain) => {
        if (id === run && withChain === chain) return;
        if (id !== run) {
          overlays.clear();
          sayOverlays();
        }
        run = id;
        chain = withChain;
        store = emptyStore();
        marks = [];
        group.forget();
        draw();
      },
    };
  };
})();
