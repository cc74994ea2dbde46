/* K5 Studio, what all parts of the page share: texts, elements, polling, formats, the mounting of components.
   Everything that people wrote reaches the page as text nodes (el), never as markup. */
(() => {
  "use strict";
  const K5 = window.K5;
  K5.parts = {};

  // --- texts -----------------------------------------------------------------------------------------------------
  K5.t = (key, values = {}) => {
    const text = (K5.texts && K5.texts[key]) || key;
    return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
  };

  // --- elements --------------------------------------------------------------------------------------------------
  K5.el = (name, attributes = {}, ...children) => {
    const [tag, ...classes] = name.split(".");
    const node = document.createElement(tag || "div");
    if (classes.length) node.className = classes.join(" ");
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "style") node.style.cssText = value;
      else if (key in node && key !== "list" && typeof value !== "string") node[key] = value;
      else node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  };
  K5.set = (node, text) => {
    if (node.textContent !== text) node.textContent = text;
  };
  K5.toggle = (node, name, on) => node.classList.toggle(name, Boolean(on));

  const SHAPES = {
    play: "M7 5l8 5-8 5z",
    pause: "M7 5v10M13 5v10",
    stop: "M5 5h10v10H5z",
    close: "M5 5l10 10M15 5L5 15",
    dice: "M4 4h12v12H4zM7.5 7.5h.01M12.5 12.5h.01M10 10h.01M12.5 7.5h.01M7.5 12.5h.01",
    again: "M4 10a6 6 0 1 0 2-4.5M6 2v4h4",
    swap: "M4 7h11l-3-3M16 13H5l3 3",
    plus: "M10 4v12M4 10h12",
    copy: "M7 7h9v9H7zM4 13V4h9",
    file: "M5 3h7l3 3v11H5zM12 3v3h3",
    down: "M10 3v10M6 9l4 4 4-4M4 17h12",
    trash: "M4 6h12M8 6V4h4v2M6 6l1 11h6l1-11",
    use: "M12 4l-6 6 6 6",
    film: "M3 5h14v10H3zM7 5v10M13 5v10",
    sun: "M10 6a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM10 1.5v2M10 16.5v2M1.5 10h2M16.5 10h2M4 4l1.4 1.4M14.6 14.6L16 16M16 4l-1.4 1.4M5.4 14.6L4 16",
    moon: "M16 12A7 7 0 0 1 8 4a6.5 6.5 0 1 0 8 8z",
    auto: "M10 3a7 7 0 1 0 0 14zM10 3a7 7 0 0 1 0 14",
  };
  K5.shapes = SHAPES; // other scripts add theirs
  K5.icon = (name) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 20 20");
    svg.setAttribute("aria-hidden", "true");
    svg.classList.add("k5-icon");
    const path = document.createElementNS(svg.namespaceURI, "path");
    path.setAttribute("d", SHAPES[name]);
    svg.append(path);
    return svg;
  };
  K5.button = (label, action, { icon, kind = "", title } = {}) =>
    K5.el(
      "button.k5-button" + (kind ? "." + kind.split(" ").join(".") : ""),
      { type: "button", onclick: action, title: title || (label ? null : title), "aria-label": label && label.length > 1 ? label : title || label },
      icon ? K5.icon(icon) : null,
      label ? K5.el("span", {}, label) : null,
    );
  // A button that asks once more before it acts; the question goes away by itself.
  K5.sureButton = (label, action, options) => {
    let timer = 0;
    const button = K5.button(label, () => {
      if (button.dataset.sure) {
        reset();
        action();
        return;
      }
      button.dataset.sure = "1";
      text.textContent = K5.t("js.sure");
      timer = setTimeout(reset, 3000);
    }, options);
    const text = button.querySelector("span");
    const reset = () => {
      clearTimeout(timer);
      delete button.dataset.sure;
      text.textContent = label;
    };
    return button;
  };

  // --- formats ---------------------------------------------------------------------------------------------------
  K5.seconds = (value) => {
    if (value === null || value === undefined || !isFinite(value)) return "";
    if (value < 10) return K5.t("js.seconds", { n: value.toFixed(1) });
    if (value < 90) return K5.t("js.seconds", { n: Math.round(value) });
    const minutes = Math.round(value / 60);
    if (minutes < 90) return K5.t("js.minutes", { n: minutes });
    return K5.t("js.hours", { h: Math.floor(minutes / 60), m: minutes % 60 });
  };
  K5.rate = (value) => (value < 0.1 ? value.toFixed(3) : value.toFixed(2));
  K5.gigabytes = (bytes) => (bytes / 1e9).toFixed(1);
  K5.moment = (value) => {
    const date = new Date(typeof value === "number" ? value * 1000 : value);
    if (isNaN(date)) return "";
    const time = date.toLocaleTimeString(K5.language, { hour: "2-digit", minute: "2-digit" });
    if (date.toDateString() === new Date().toDateString()) return time;
    return date.toLocaleDateString(K5.language, { day: "numeric", month: "short" }) + ", " + time;
  };
  K5.stateName = (state) => K5.t("js.state." + state);
  K5.running = (state) => ["starting", "running", "not_responding", "stopping"].includes(state);
  K5.percent = (run) => (run && run.total ? Math.min(100, (100 * (run.step || 0)) / run.total) : 0);
  K5.phaseName = (run) => {
    const texts = K5.texts || {};
    return (K5.caches(run) && texts["js.caching.phase." + run.phase]) || texts["js.phase." + run.phase] || run.message || K5.stateName(run.state);
  };
  // How fast things are done that are counted, not stepped through.
  K5.perSecond = (seconds) => (seconds < 1 ? t1("js.per_second", (1 / seconds).toFixed(seconds < 0.1 ? 0 : 1)) : t1("js.each", seconds.toFixed(1)));
  const t1 = (key, n) => K5.t(key, { n });
  K5.caches = (run) => run.kind === "cache_latents" || run.kind === "cache_text";
  K5.progressText = (run) => {
    const parts = [];
    if (K5.caches(run)) {
      if (!run.total) return run.state === "running" ? K5.phaseName(run) : "";
      parts.push(K5.t("js.caching.of", { n: run.step || 0, total: run.total }));
      if (K5.running(run.state) && run.seconds_per_step) parts.push(K5.perSecond(run.seconds_per_step));
      if (run.remaining_seconds) parts.push(K5.t("js.left", { time: K5.seconds(run.remaining_seconds) }));
      return parts.join(" · ");
    }
    if (run.phase && run.phase !== "denoise" && !(run.kind === "train" && run.total)) return run.message || "";
    if (run.total) parts.push(K5.t("js.step", { step: run.step || 0, total: run.total }));
    if (run.seconds_per_step) parts.push(K5.t("js.rate", { n: K5.rate(run.seconds_per_step) }));
    if (run.remaining_seconds) parts.push(K5.t("js.left", { time: K5.seconds(run.remaining_seconds) }));
    return parts.join(" · ");
  };

  // --- the server ------------------------------------------------------------------------------------------------
  K5.get = async (path) => {
    const answer = await fetch(new URL("api/" + path, document.baseURI), { cache: "no-store" });
    if (!answer.ok) throw new Error(path + ": " + answer.status);
    return answer.json();
  };
  K5.url = (path) => new URL(String(path).replace(/^\//, ""), document.baseURI).href;
  K5.shown = (node) => document.visibilityState === "visible" && node.isConnected && node.offsetParent !== null;

  const listeners = {};
  K5.on = (name, callback) => {
    (listeners[name] = listeners[name] || new Set()).add(callback);
    return () => listeners[name].delete(callback);
  };
  K5.emit = (name, value) => {
    for (const callback of [...(listeners[name] || [])]) callback(value);
  };

  // One poll of the status for the whole page; parts listen to it and fetch more only while they are on screen.
  let pollTimer = 0;
  let misses = 0;
  let asking = false;
  const poll = async () => {
    clearTimeout(pollTimer);
    if (asking) return;
    asking = true;
    let wait = 3000;
    if (document.visibilityState === "visible") {
      try {
        K5.status = await K5.get("status");
        misses = 0;
        K5.emit("status", K5.status);
        if (K5.status.running || (K5.status.queue || []).length) wait = 700;
      } catch (error) {
        misses += 1;
        if (misses > 1) K5.emit("status", null);
      }
    }
    asking = false;
    pollTimer = setTimeout(poll, wait);
  };
  K5.poke = () => poll();
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && poll());

  // Calls a server function of a component; a problem comes back as {"error": sentence} and is shown, not thrown.
  K5.ask = async (server, name, ...values) => {
    try {
      const answer = await server[name](values);
      if (answer && answer.error) K5.notice(answer.error, "bad");
      K5.poke();
      return answer;
    } catch (error) {
      K5.notice(K5.t("js.unreachable"), "bad");
      return null;
    }
  };

  // --- short messages --------------------------------------------------------------------------------------------
  K5.notice = (text, kind = "") => {
    let shelf = document.querySelector(".k5-notices");
    if (!shelf) {
      shelf = K5.el("div.k5-notices", { role: "status", "aria-live": "polite" });
      document.body.append(shelf);
    }
    const note = K5.el("div.k5-notice" + (kind ? "." + kind : ""), {}, K5.el("span", {}, text));
    note.append(K5.button("", () => note.remove(), { icon: "close", kind: "plain", title: K5.t("js.close") }));
    shelf.append(note);
    while (shelf.children.length > 3) shelf.firstChild.remove();
    setTimeout(() => note.remove(), kind === "bad" ? 12000 : 5000);
  };
  K5.copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      K5.notice(K5.t("js.copied"));
    } catch (error) {
      K5.notice(K5.t("js.copy_failed"), "bad");
    }
  };

  // A place that takes files; what is dropped elsewhere is the browser's own business.
  K5.acceptDrop = (node, take) => {
    node.addEventListener("dragover", (event) => {
      event.preventDefault();
      node.classList.add("k5-over");
    });
    node.addEventListener("dragleave", () => node.classList.remove("k5-over"));
    node.addEventListener("drop", (event) => {
      event.preventDefault();
      node.classList.remove("k5-over");
      if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    });
  };

  // --- tabs, theme, keys -----------------------------------------------------------------------------------------
  // On a very narrow screen some tabs stand in a menu, where they have nothing but their text.
  const menuButton = (name) => {
    const inMenu = [...document.querySelectorAll("#k5-tabs .overflow-dropdown button")];
    return inMenu.find((button) => button.textContent.trim() === K5.t("tab." + name));
  };
  K5.openTab = (name) => {
    const button = document.getElementById("k5-tab-" + name + "-button") || menuButton(name);
    if (button) button.click();
  };
  K5.openRun = (id) => {
    K5.wantedRun = id;
    K5.openTab("runs");
    K5.emit("open-run", id);
  };
  K5.setTheme = (theme) => {
    K5.theme = theme;
    const dark = theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.classList.toggle("dark", dark);
    if (document.body) document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => K5.setTheme(K5.theme));
  K5.setTheme(K5.theme);
  const start = () => {
    document.documentElement.lang = K5.language;
    // Gradio sets its own class from the system's preference while it starts; ours has the last word.
    new MutationObserver(() => {
      const wanted = document.documentElement.classList.contains("dark");
      if (document.body.classList.contains("dark") !== wanted) document.body.classList.toggle("dark", wanted);
    }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    K5.setTheme(K5.theme);
    poll();
  };
  // Gradio may put this script into the page after it has been read.
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest && event.target.closest("input, textarea, select, button, video, [contenteditable]");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      K5.emit("start");
    } else if (event.key === "Escape") K5.emit("escape");
    else if (event.key === " " && !typing) {
      event.preventDefault();
      K5.emit("space");
    }
  });

  // --- components ------------------------------------------------------------------------------------------------
  K5.mount = (name, context) => {
    const root = context.element.querySelector(".k5-root");
    root.replaceChildren();
    root.classList.add("k5-" + name);
    const started = K5.parts[name](root, context);
    if (started && started.update) {
      context.watch("value", () => started.update(context.props.value));
      started.update(context.props.value);
    }
  };
})();
