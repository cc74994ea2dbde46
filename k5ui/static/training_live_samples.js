/* Samples of a training: a grid of prompts by steps whose clips play in step with each other, and two of them compared
   under a wipe. Space plays, Esc closes, arrows go to the next step or prompt. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const COLUMNS = 6;
  const DRIFT = 0.06; // seconds that two clips may be apart

  // Clips that play as one: the first that is ready is the clock, the others follow it.
  K5.playTogether = (list) => {
    let timer = 0;
    const videos = () => list().filter((video) => video.isConnected);
    const follow = () => {
      const playing = videos();
      const clock = playing.find((video) => video.readyState >= 2);
      if (!clock) return;
      for (const video of playing) {
        if (video === clock || video.readyState < 2) continue;
        const length = Math.min(video.duration, clock.duration) || 1;
        const apart = Math.abs(video.currentTime - clock.currentTime);
        if (Math.min(apart, length - apart) > DRIFT) video.currentTime = Math.min(clock.currentTime, (video.duration || 1) - 0.01);
        if (video.paused) video.play().catch(() => {});
      }
    };
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      for (const video of videos()) video.pause();
    };
    const play = () => {
      clearInterval(timer);
      for (const video of videos()) {
        if (video.readyState >= 1) video.currentTime = 0;
        video.play().catch(() => {});
      }
      timer = setInterval(() => (videos().length ? follow() : stop()), 200);
    };
    return { play, stop, playing: () => timer !== 0, toggle: () => (timer ? stop() : play()) };
  };

  const clipOf = (sample, eager) => {
    if (sample.kind !== "video") return el("img", { src: K5.url(sample.url), alt: sample.prompt || "", loading: "lazy" });
    const video = el("video", { playsInline: true, preload: eager ? "auto" : "metadata", "aria-label": sample.prompt || "", src: K5.url(sample.url) + (eager ? "" : "#t=0.001") });
    video.muted = true;
    video.loop = true;
    return video;
  };

  // One sample large, or two under a wipe that follows the pointer.
  K5.sampleViewer = () => {
    let samples = [];
    let current = null;
    let other = null;
    let share = 0.5;
    let before = null;
    const screen = el("div.k5-wipe");
    const line = el("input.k5-slider.k5-wipe-range", { type: "range", min: "0", max: "1", step: "0.005", value: "0.5", "aria-label": t("js.live.wipe"), oninput: () => wipe(Number(line.value)) });
    const caption = el("div.k5-wipe-caption");
    const facts = el("div.k5-facts");
    const against = el("select.k5-input.k5-wipe-select", { "aria-label": t("js.live.compare_with"), onchange: () => show(current, against.value) });
    const together = K5.playTogether(() => [...screen.querySelectorAll("video")]);
    const box = el("dialog.k5-dialog.k5-root.k5-viewer", { "aria-label": t("js.live.viewer") },
      el("div.k5-row", {}, caption, el("span.k5-grow"), K5.button("", () => close(), { icon: "close", kind: "plain", title: t("js.close") })),
      screen, line, el("div.k5-row.k5-viewer-tools", {},
        K5.button("", () => together.toggle(), { icon: "play", title: t("js.play_pause") }),
        el("label.k5-row", {}, el("span.k5-muted", {}, t("js.live.compare_with")), against), el("span.k5-grow"), facts));
    const wipe = (value) => {
      share = Math.min(1, Math.max(0, value));
      screen.style.setProperty("--k5-wipe", (share * 100).toFixed(2) + "%");
      if (Number(line.value) !== share) line.value = String(share);
    };
    screen.addEventListener("pointermove", (event) => {
      if (!other) return;
      const area = screen.getBoundingClientRect();
      wipe((event.clientX - area.left) / area.width);
    });
    screen.addEventListener("click", () => together.toggle());
    const name = (sample) => t("js.live.at_step", { n: K5.count(sample.step) });
    const show = (sample, withMedia) => {
      current = sample;
      other = samples.find((item) => item.media === withMedia && item.media !== sample.media) || null;
      screen.replaceChildren(el("div.k5-wipe-one", {}, clipOf(sample, true)), ...(other ? [el("div.k5-wipe-two", {}, clipOf(other, true)), el("i.k5-wipe-line"), el("span.k5-wipe-name.left", {}, name(sample)), el("span.k5-wipe-name.right", {}, name(other))] : [el("span.k5-wipe-name.left", {}, name(sample))]));
      screen.style.aspectRatio = sample.width && sample.height ? sample.width + " / " + sample.height : "3 / 2";
      screen.style.setProperty("--k5-shape", sample.width && sample.height ? String(sample.width / sample.height) : "1.5");
      line.hidden = !other;
      wipe(share);
      set(caption, sample.prompt || "");
      set(facts, [sample.width ? sample.width + "×" + sample.height : "", sample.frames > 1 ? t("js.frames", { n: sample.frames }) : "", sample.seed === null ? "" : t("js.seed", { n: sample.seed })].filter(Boolean).join(" · "));
      const same = samples.filter((item) => item.index === sample.index && item.media !== sample.media);
      against.replaceChildren(el("option", { value: "" }, t("js.live.nothing")), ...same.map((item) => el("option", { value: item.media, selected: item === other }, name(item))));
      against.value = other ? other.media : "";
      together.play();
    };
    const go = (steps, prompts) => {
      const indexes = [...new Set(samples.map((item) => item.index))].sort((a, b) => a - b);
      const index = indexes[Math.min(indexes.length - 1, Math.max(0, indexes.indexOf(current.index) + prompts))];
      const row = samples.filter((item) => item.index === index).sort((a, b) => a.step - b.step);
      const at = row.findIndex((item) => item.step >= current.step);
      const next = row[Math.min(row.length - 1, Math.max(0, (at < 0 ? row.length - 1 : at) + steps))];
      if (next && next !== current) show(next, prompts ? "" : against.value);
    };
    const close = () => {
      together.stop();
      if (box.open) box.close();
      screen.replaceChildren();
      box.remove();
      if (before && before.isConnected) before.focus();
    };
    box.addEventListener("cancel", (event) => (event.preventDefault(), close()));
    box.addEventListener("click", (event) => event.target === box && close());
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault();
        event.stopPropagation();
        close();
        return;
      }
      if (event.target.matches("input, select")) return;
      const act = { " ": () => together.toggle(), ArrowLeft: () => go(-1, 0), ArrowRight: () => go(1, 0), ArrowUp: () => go(0, -1), ArrowDown: () => go(0, 1) }[event.key];
      if (!act || event.target.matches("button") && event.key === " ") return;
      event.preventDefault();
      event.stopPropagation();
      act();
    });
    return {
      open: (all, sample, withMedia) => {
        samples = all;
        before = document.activeElement;
        document.body.append(box);
        share = 0.5;
        box.showModal();
        show(sample, withMedia || "");
      },
    };
  };

  K5.sampleGrid = () => {
    const viewer = K5.sampleViewer();
    let samples = [];
    let prompts = [];
    let from = 0; // columns that are passed over, newest first
    let picked = null;
    let drawn = "";
    const cells = new Map(); // media -> node, so that a clip that is there is not loaded again
    const grid = el("div.k5-samples");
    const empty = el("p.k5-muted.k5-samples-empty");
    const older = K5.button(t("js.live.older"), () => page(COLUMNS), { kind: "chip" });
    const newer = K5.button(t("js.live.newer"), () => page(-COLUMNS), { kind: "chip" });
    const together = K5.playTogether(() => [...grid.querySelectorAll("video")]);
    const playAll = K5.button(t("js.live.play_all"), () => (together.toggle(), sayPlaying()), { icon: "play", kind: "chip", title: t("js.live.play_all_title") });
    const compare = K5.button(t("js.live.compare"), () => {
      const [a, b] = picked;
      viewer.open(samples, a, b.media);
    }, { kind: "chip", title: t("js.live.compare_title") });
    const tools = el("div.k5-tools", {}, playAll, compare, el("span.k5-grow"), newer, older);
    const box = el("section.k5-card", { "aria-label": t("js.live.samples") }, el("div.k5-row", {}, el("h3.k5-card-title", {}, t("js.live.samples")), el("span.k5-grow"), tools), empty, grid);
    const sayPlaying = () => {
      playAll.replaceChildren(K5.icon(together.playing() ? "pause" : "play"), el("span", {}, t("js.live.play_all")));
    };
    const page = (by) => {
      const steps = new Set(samples.map((sample) => sample.step)).size;
      from = Math.max(0, Math.min(from + by, Math.max(0, steps - 1)));
      draw();
    };
    const rowOrColumn = (choose) => K5.playTogether(() => [...grid.querySelectorAll("video")].filter(choose));
    let partial = null;
    const playPart = (choose) => {
      together.stop();
      sayPlaying();
      const same = partial && partial.choose === choose && partial.players.playing();
      if (partial) partial.players.stop();
      partial = { choose, players: rowOrColumn(choose) };
      if (!same) partial.players.play();
    };
    const cell = (sample) => {
      if (!cells.has(sample.media)) {
        const node = el("button.k5-sample", { type: "button", title: t("js.live.open_sample"), onclick: (event) => {
          const now = samples.find((item) => item.media === sample.media) || sample;
          if (event.ctrlKey || event.metaKey || event.shiftKey) pick(now);
          else viewer.open(samples, now);
        } }, clipOf(sample, false));
        const video = node.querySelector("video");
        if (video) {
          node.addEventListener("mouseenter", () => together.playing() || video.play().catch(() => {}));
          node.addEventListener("mouseleave", () => together.playing() || (partial && partial.players.playing()) || video.pause());
        }
        cells.set(sample.media, node);
      }
      const node = cells.get(sample.media);
      node.style.aspectRatio = sample.width && sample.height ? sample.width + " / " + sample.height : "3 / 2";
      const video = node.querySelector("video");
      if (video) Object.assign(video.dataset, { step: String(sample.step), index: String(sample.index) });
      return node;
    };
    let marked = [];
    const pick = (sample) => {
      marked = marked.includes(sample.media) ? marked.filter((media) => media !== sample.media) : [...marked, sample.media].slice(-2);
      sayPicked();
    };
    // Without a choice, the newest of the first prompt and the oldest of it: what the training has changed.
    const sayPicked = () => {
      for (const [media, node] of cells) K5.toggle(node, "on", marked.includes(media));
      let pair = marked.map((media) => samples.find((sample) => sample.media === media)).filter(Boolean);
      if (pair.length < 2 && prompts.length) {
        const row = samples.filter((sample) => sample.index === prompts[0].index);
        pair = row.length > 1 ? [row[row.length - 1], row[0]] : [];
      }
      picked = pair.length === 2 ? pair : null;
      compare.disabled = !picked;
    };
    const draw = () => {
      const steps = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => b - a);
      from = Math.min(from, Math.max(0, steps.length - 1));
      const shown = steps.slice(from, from + COLUMNS);
      const mark = JSON.stringify([shown, prompts, samples.filter((sample) => shown.includes(sample.step)).map((sample) => sample.media)]);
      newer.disabled = from === 0;
      older.disabled = from + COLUMNS >= steps.length;
      newer.hidden = older.hidden = steps.length <= COLUMNS;
      tools.hidden = !samples.length;
      empty.hidden = samples.length > 0;
      if (mark !== drawn) {
        drawn = mark;
        grid.style.setProperty("--k5-columns", String(Math.max(shown.length, 3)));
        const nodes = [el("span.k5-sample-corner"), ...shown.map((step) => {
          const choose = (video) => video.dataset.step === String(step);
          return el("button.k5-sample-step", { type: "button", title: t("js.live.play_column"), onclick: () => playPart(choose) }, K5.count(step));
        })];
        const fillers = Math.max(0, 3 - shown.length);
        for (let n = 0; n < fillers; n += 1) nodes.push(el("span"));
        for (const { index, prompt } of prompts) {
          const choose = (video) => video.dataset.index === String(index);
          nodes.push(el("button.k5-sample-prompt", { type: "button", title: (prompt || "") + "\n" + t("js.live.play_row"), onclick: () => playPart(choose) }, prompt || "#" + index));
          for (const step of shown) {
            const sample = samples.find((item) => item.step === step && item.index === index);
            nodes.push(sample ? cell(sample) : el("span.k5-sample.none"));
          }
          for (let n = 0; n < fillers; n += 1) nodes.push(el("span"));
        }
        const kept = new Set(nodes);
        for (const [media, node] of cells) if (!kept.has(node)) cells.delete(media);
        grid.replaceChildren(...nodes);
      }
      sayPicked();
    };
    K5.on("space", () => {
      if (!K5.shown(grid) || !samples.some((sample) => sample.kind === "video")) return;
      together.toggle();
      sayPlaying();
    });
    return {
      box,
      show: (list, names) => {
        // A new column appears at the left; who looks at older ones keeps them.
        const before = new Set(samples.map((sample) => sample.step));
        const fresh = new Set(list.map((sample) => sample.step).filter((step) => !before.has(step))).size;
        if (from > 0 && before.size) from += fresh;
        samples = list;
        prompts = names;
        draw();
      },
      say: (text) => set(empty, text),
      clear: () => {
        samples = [];
        prompts = [];
        marked = [];
        from = 0;
        drawn = "";
        cells.clear();
        grid.replaceChildren();
        together.stop();
        sayPlaying();
        draw();
      },
    };
  };
})();
