/* The player of one clip: loops, click and space pause, a bar to go to any frame. Tiny clips are drawn smoothly. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const TINY = 256; // pixels; below this a browser's own enlargement may show blocks

  K5.player = (clip) => {
    const fps = clip.fps || 24;
    const frames = clip.frames || 1;
    const video = el("video", { src: K5.url(clip.url), playsInline: true, preload: "auto", "aria-label": clip.prompt || "", onclick: () => toggle() });
    video.muted = true;
    video.loop = true;
    video.autoplay = true;
    const button = K5.button("", () => toggle(), { icon: "pause", kind: "plain", title: t("js.play_pause") });
    const range = el("input.k5-slider", { type: "range", min: "0", max: String(Math.max(1, frames - 1)), step: "1", value: "0", "aria-label": t("js.frame") });
    const counter = el("span.k5-frame");
    const screen = el("div.k5-player", {}, video);
    const bar = el("div.k5-player-bar", {}, button, range, counter);
    let canvas = null;
    let small = null;
    if (clip.width && clip.width <= TINY && clip.height <= TINY) {
      const factor = Math.max(2, Math.floor(384 / Math.max(clip.width, clip.height)));
      canvas = el("canvas", { width: clip.width * factor, height: clip.height * factor, "aria-hidden": "true", onclick: () => toggle() });
      small = el("canvas", { width: clip.width, height: clip.height });
      screen.append(canvas);
    }
    const toggle = () => {
      if (video.paused) video.play().catch(() => {});
      else video.pause();
    };
    const draw = () => {
      if (canvas && video.readyState >= 2) {
        const context = canvas.getContext("2d");
        context.imageSmoothingEnabled = true;
        context.imageSmoothingQuality = "high";
        // In two steps: a frame of a video is enlarged with blocks where a picture is enlarged smoothly.
        small.getContext("2d").drawImage(video, 0, 0, small.width, small.height);
        context.drawImage(small, 0, 0, canvas.width, canvas.height);
      }
      const frame = Math.min(frames - 1, Math.max(0, Math.floor(video.currentTime * fps + 0.01)));
      if (document.activeElement !== range || !video.paused) range.value = String(frame);
      set(counter, t("js.frame_of", { n: frame + 1, total: frames }));
    };
    // Drawn once for each frame of the clip, not of the screen.
    let waiting = false;
    const next = () => {
      if (waiting || video.paused || !screen.isConnected) return;
      waiting = true;
      const drawn = () => {
        waiting = false;
        draw();
        next();
      };
      if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(drawn);
      else setTimeout(drawn, 1000 / fps);
    };
    const state = () => {
      button.replaceChildren(K5.icon(video.paused ? "play" : "pause"));
      draw();
      next();
    };
    // Off the screen it rests.
    let resting = false;
    new IntersectionObserver((entries) => {
      const seen = entries[entries.length - 1].isIntersecting;
      if (!seen && !video.paused) {
        resting = true;
        video.pause();
      } else if (seen && resting) {
        resting = false;
        video.play().catch(() => {});
      }
    }).observe(screen);
    for (const name of ["play", "pause", "seeked", "loadeddata"]) video.addEventListener(name, state);
    range.addEventListener("input", () => {
      video.pause();
      video.currentTime = (Number(range.value) + 0.5) / fps;
    });
    set(counter, t("js.frame_of", { n: 1, total: frames }));
    return { screen, bar, video, toggle };
  };
})();
