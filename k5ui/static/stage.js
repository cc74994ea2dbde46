/* The right side of Generate: the current clip, live progress, waiting runs, failures, earlier clips. */
(() => {
  "use strict";
  const { el, set, t } = K5;

  const isVideo = (clip) => clip.kind === "video";
  const isPicture = (clip) => clip.kind === "image" || clip.kind === "images";
  const describe = (clip) =>
    [
      clip.width ? clip.width + "×" + clip.height : "",
      clip.frames ? t("js.frames", { n: clip.frames }) : "",
      isVideo(clip) && clip.seconds ? K5.seconds(clip.seconds) : "",
      clip.seed !== null && clip.seed !== undefined ? t("js.seed", { n: clip.seed }) : "",
    ].filter(Boolean).join(" · ");

  // A clip as a small picture; videos play when a tile is pointed at.
  const picture = (clip) => {
    const label = clip.prompt || clip.task || "";
    if (isVideo(clip)) {
      // The fragment makes the browser show the first frame.
      const video = el("video", { src: K5.url(clip.url) + "#t=0.001", playsInline: true, preload: "metadata", "aria-label": label });
      video.muted = true;
      video.loop = true;
      return video;
    }
    if (isPicture(clip)) return el("img", { src: K5.url(clip.url), alt: label, loading: "lazy" });
    return el("span.k5-latent", { title: label }, t("js.latent"));
  };

  const makeScreen = (actions) => {
    const screen = el("div.k5-screen");
    const caption = el("div.k5-caption-text");
    const facts = el("div.k5-facts");
    const tools = el("div.k5-tools");
    const controls = el("div.k5-controls");
    let player = null;
    const box = el("div.k5-current", {}, screen, controls, el("div.k5-caption", {}, caption, facts), tools);
    let current = null;
    const emptyTitle = el("strong");
    const emptyText = el("span");
    // The empty screen tells what to do, or what is happening.
    const hint = (run) => {
      set(emptyTitle, t(run ? "js.making_title" : "js.empty_title"));
      set(emptyText, run ? (run.phase === "denoise" && run.total ? K5.progressText(run) : t("js.making_text")) : t("js.empty_text"));
    };
    const empty = () => {
      current = null;
      box.classList.add("empty");
      screen.replaceChildren(el("div.k5-empty", {}, K5.icon("film"), emptyTitle, emptyText));
      player = null;
      controls.replaceChildren();
      set(caption, "");
      set(facts, "");
      tools.replaceChildren();
    };
    const show = (clip) => {
      if (current && current.media === clip.media) return;
      current = clip;
      box.classList.remove("empty");
      player = isVideo(clip) ? K5.player(clip) : null;
      screen.replaceChildren(player ? player.screen : picture(clip));
      controls.replaceChildren(...(player ? [player.bar] : []));
      set(caption, clip.prompt || "");
      caption.title = clip.prompt || "";
      set(facts, describe(clip));
      const video = player && player.video;
      tools.replaceChildren(
        K5.button(t("js.use_settings"), () => K5.emit("use-settings", { media: clip.media }), { icon: "use", kind: "plain" }),
        ...(video ? [K5.button(t("js.use_frame"), () => lastFrame(video), { icon: "film", kind: "plain" })] : []),
        el("a.k5-button.plain", { href: K5.url(clip.url), download: (clip.run_id || "clip") + "-" + (clip.seed ?? "") + extension(clip) }, K5.icon("down"), el("span", {}, t("js.download"))),
        K5.sureButton(t("js.trash"), () => actions.trash(clip.run_id), { icon: "trash", kind: "plain" }),
      );
    };
    K5.on("space", () => player && K5.shown(screen) && player.toggle());
    return { box, show, empty, hint, current: () => current };
  };
  const extension = (clip) => (isVideo(clip) ? ".mp4" : isPicture(clip) ? ".png" : ".safetensors");

  // The last frame of a loaded clip, drawn by the browser and handed to the form as a PNG.
  const lastFrame = (video) => {
    video.pause();
    const take = () => {
      const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => blob && K5.emit("use-frame", blob), "image/png");
    };
    video.addEventListener("seeked", take, { once: true });
    video.currentTime = Math.max(0, video.duration - 0.001);
  };

  const makeLive = (actions) => {
    const bar = el("i");
    const line = el("div.k5-live-line", { role: "status" });
    const numbers = el("div.k5-numbers");
    const stop = K5.button(t("js.stop"), () => actions.stop(), { icon: "stop" });
    const box = el("div.k5-live", {}, el("div.k5-live-text", {}, line, numbers), stop, el("div.k5-bar", {}, bar));
    const show = (run) => {
      K5.toggle(box, "on", run);
      stop.hidden = !run;
      if (!run) {
        set(line, t("js.ready"));
        set(numbers, "");
        bar.style.width = "0";
        K5.toggle(box, "waiting", false);
        return;
      }
      const stopping = run.state === "stopping";
      stop.disabled = stopping;
      set(line, stopping || run.state !== "running" ? K5.stateName(run.state) : phaseText(run));
      set(numbers, K5.progressText(run));
      bar.style.width = K5.percent(run) + "%";
      K5.toggle(box, "waiting", !run.step);
    };
    return { box, show };
  };
  const phaseText = (run) => {
    if (run.kind !== "generate") return t("js.kind." + run.kind) + ": " + run.title;
    const key = "js.phase." + run.phase;
    const text = t(key);
    return text !== key ? text : run.message || K5.stateName(run.state);
  };

  const makeQueue = (actions) => {
    const box = el("ol.k5-waiting", { "aria-label": t("js.queue") });
    const show = (ids, runs) => {
      box.replaceChildren(...ids.map((id) => {
        const run = runs[id] || {};
        return el("li", {}, el("span.k5-clip-text", { title: run.prompt || id }, run.prompt || run.title || id),
          K5.button("", () => actions.dequeue(id), { icon: "close", kind: "plain", title: t("js.remove") }));
      }));
    };
    return { box, show };
  };

  const makeFailure = () => {
    const box = el("div.k5-failure-place");
    let shown = null;
    const hidden = new Set();
    const show = async (run) => {
      const id = run && !hidden.has(run.id) ? run.id : null;
      if (id === shown) return;
      shown = id;
      box.replaceChildren();
      if (!id) return;
      const full = await K5.get("runs/" + encodeURIComponent(id));
      if (shown !== id) return;
      const problems = (full.problems || []).map((problem) => el("li", {}, problem.field ? problem.field + ": " + problem.message : problem.message));
      box.replaceChildren(el("div.k5-failure", { role: "alert" },
        el("div.k5-row", {}, el("strong", {}, K5.t("js.failed_title", { state: K5.stateName(full.state) })), el("span.k5-grow"),
          K5.button("", () => (hidden.add(id), show(null)), { icon: "close", kind: "plain", title: t("js.close") })),
        problems.length ? el("ul", {}, problems) : el("p", {}, full.message || t("js.failed_unknown")),
        el("div.k5-tools", {},
          K5.button(t("js.open_run"), () => K5.openRun(id), { kind: "plain" }),
          K5.button(t("js.use_settings"), () => K5.emit("use-settings", { run: id }), { icon: "use", kind: "plain" })),
        full.log_tail ? el("details", {}, el("summary", {}, t("js.log_tail")), el("pre.k5-log", {}, full.log_tail)) : null));
    };
    return { box, show };
  };

  const makeStrip = (choose) => {
    const box = el("div.k5-strip", { role: "list", "aria-label": t("js.earlier") });
    const tiles = new Map();
    const tile = (clip) => {
      const node = el("button.k5-tile", { type: "button", title: clip.prompt || "", onclick: () => choose(clip) }, picture(clip),
        isVideo(clip) && clip.seconds ? el("span.k5-badge", {}, K5.seconds(clip.seconds)) : null);
      const video = node.querySelector("video");
      if (video) {
        const play = () => video.play().catch(() => {});
        const rest = () => {
          video.pause();
          video.currentTime = 0;
        };
        node.addEventListener("mouseenter", play);
        node.addEventListener("focus", play);
        node.addEventListener("mouseleave", rest);
        node.addEventListener("blur", rest);
      }
      return node;
    };
    const show = (clips) => {
      const wanted = new Set(clips.map((clip) => clip.media));
      for (const [media, node] of tiles) {
        if (!wanted.has(media)) {
          node.remove();
          tiles.delete(media);
        }
      }
      clips.forEach((clip, index) => {
        if (!tiles.has(clip.media)) tiles.set(clip.media, tile(clip));
        const node = tiles.get(clip.media);
        if (box.children[index] !== node) box.insertBefore(node, box.children[index] || null);
      });
    };
    const mark = (clip) => {
      for (const [media, node] of tiles) K5.toggle(node, "on", clip && media === clip.media);
    };
    return { box, show, mark };
  };

  K5.parts.stage = (root, { server }) => {
    let clips = [];
    let runs = {};
    let running = null;
    let follow = true; // show the newest clip until somebody picks another one
    let seen = "";
    const actions = {
      stop: () => running && K5.ask(server, "stop", running.id),
      dequeue: (id) => K5.ask(server, "dequeue", id).then(refresh),
      trash: (id) => K5.ask(server, "trash", id).then(refresh),
    };
    const screen = makeScreen(actions);
    const live = makeLive(actions);
    const queue = makeQueue(actions);
    const failure = makeFailure();
    const strip = makeStrip((clip) => {
      follow = clips.length > 0 && clip.media === clips[0].media;
      screen.show(clip);
      strip.mark(clip);
    });
    const earlier = el("h3.k5-heading", {}, t("js.earlier"));
    K5.acceptDrop(screen.box, (file) => K5.emit("settings-file", file));
    root.append(screen.box, live.box, queue.box, failure.box, earlier, strip.box);
    screen.empty();
    screen.hint(null);
    live.show(null);

    const refresh = async () => {
      let answers;
      try {
        answers = await Promise.all([K5.get("clips?limit=60"), K5.get("runs?limit=60")]);
      } catch (error) {
        return; // the header says that the server is away; the next status brings this again
      }
      clips = answers[0].clips;
      runs = Object.fromEntries(answers[1].runs.map((run) => [run.id, run]));
      const current = screen.current();
      const still = current && clips.some((clip) => clip.media === current.media);
      if (!clips.length) screen.empty();
      else if (follow || !still) screen.show(clips[0]);
      strip.show(clips);
      strip.mark(screen.current());
      earlier.hidden = !clips.length;
      const newest = answers[1].runs.find((run) => run.kind === "generate" && run.ended);
      failure.show(newest && ["failed", "crashed", "interrupted"].includes(newest.state) ? newest : null);
      queue.show((K5.status && K5.status.queue) || [], runs);
    };
    const show = (status) => {
      if (!status) return;
      running = status.running;
      live.show(running);
      screen.hint(running && running.kind === "generate" ? running : null);
      const mark = JSON.stringify([status.version, running && running.id, running && running.state, running && (running.outputs || []).length, status.queue]);
      if (mark !== seen && K5.shown(root)) {
        seen = mark;
        refresh();
      }
    };
    K5.on("status", show);
    K5.on("submitted", () => {
      follow = true;
      K5.poke();
      if (innerWidth < 900) live.box.scrollIntoView({ block: "end", behavior: "smooth" });
    });
    if (K5.status) show(K5.status);
  };
})();
