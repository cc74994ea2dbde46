/* The parts of the Generate form that are not Gradio fields: chips, seed buttons, LoRA rows, problems, the start bar. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const field = (name) => document.getElementById(name.startsWith("lora_") ? "k5-loras" : "k5-f-" + name);
  // A closed accordion holds no fields yet; this one will.
  const holder = (name) => {
    if (name === "negative_prompt") return "k5-negative";
    return name.startsWith("image") && name !== "image_format" ? "k5-images" : "k5-advanced";
  };
  const slot = (name) => document.getElementById("k5-slot-" + name);
  const fill = (name, ...children) => {
    const place = slot(name);
    if (place) place.replaceChildren(...children.filter(Boolean));
  };

  // Writes into a Gradio text field as typing would.
  const type = (name, text) => {
    const input = field(name) && field(name).querySelector("textarea, input");
    if (!input) return;
    const prototype = input.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(prototype.prototype, "value").set.call(input, text);
    input.dispatchEvent(new Event("input", { bubbles: true }));
    input.focus();
  };

  // Opens the accordion that hides a field.
  const reveal = (node) => {
    for (let box = node.parentElement; box; box = box.parentElement) {
      const head = box.querySelector(":scope > button.label-wrap");
      if (head && !head.classList.contains("open")) head.click();
    }
  };
  const focusField = (name, again = 20) => {
    const node = field(name);
    if (!node) {
      const head = document.querySelector("#" + holder(name) + " > button.label-wrap");
      if (head && !head.classList.contains("open")) head.click();
      if (again) setTimeout(() => focusField(name, again - 1), 50);
      return;
    }
    reveal(node);
    setTimeout(() => {
      node.scrollIntoView({ block: "center", behavior: "smooth" });
      const input = node.querySelector("input, textarea, button");
      if (input) input.focus({ preventScroll: true });
    }, 60);
  };

  const showProblems = (problems) => {
    const byField = {};
    for (const problem of problems) if (problem.field) (byField[problem.field] = byField[problem.field] || []).push(problem.message);
    for (const node of document.querySelectorAll(".k5-problem-line[data-field]")) {
      if (!byField[node.dataset.field]) {
        node.remove();
        const owner = field(node.dataset.field);
        if (owner) owner.classList.remove("k5-wrong");
      }
    }
    for (const [name, messages] of Object.entries(byField)) {
      const owner = field(name);
      if (!owner) continue;
      owner.classList.add("k5-wrong");
      let line = owner.querySelector(":scope > .k5-problem-line");
      if (!line) {
        line = el("div.k5-problem-line", { role: "alert" });
        line.dataset.field = name;
        owner.append(line);
      }
      set(line, messages.map((message) => message.replace(/^[a-z]+ /, (word) => word.charAt(0).toUpperCase() + word.slice(1))).join(" "));
    }
  };

  const chip = (label, on, action, title) =>
    el("button.k5-chip" + (on ? ".on" : ""), { type: "button", onclick: action, "aria-pressed": String(Boolean(on)), title }, label);

  // --- the start bar, owner of the form's state ------------------------------------------------------------------
  K5.parts.actions = (root, { trigger, upload }) => {
    let state = {};
    let count = 1;
    const summary = el("div.k5-summary");
    const problemList = el("ul.k5-problems");
    const startText = el("span", {}, t("js.generate"));
    const start = el("button.k5-start", { type: "button", id: "k5-generate", title: "Ctrl+Enter", onclick: () => go() }, startText, el("kbd", {}, "Ctrl ⏎"));
    const countText = el("span.k5-count", { "aria-live": "polite" }, "×1");
    const setCount = (value) => {
      count = Math.max(1, Math.min(16, value));
      set(countText, "×" + count);
    };
    const commandBox = el("textarea.k5-command", { readOnly: true, rows: 3, hidden: true, "aria-label": t("js.command") });
    const stepper = el("div.k5-stepper", { role: "group", "aria-label": t("js.count") },
      K5.button("−", () => setCount(count - 1), { title: t("js.fewer") }), countText,
      K5.button("+", () => setCount(count + 1), { title: t("js.more") }));
    const tools = el("div.k5-tools", {},
      K5.button(t("js.copy_command"), () => trigger("command", {}), { icon: "copy", kind: "plain" }),
      K5.sureButton(t("js.reset"), () => trigger("reset", {}), { icon: "again", kind: "plain" }));
    const notices = el("div.k5-notes");
    root.append(problemList, notices, commandBox, el("div.k5-go", {}, stepper, start), summary);

    let busy = 0;
    const go = () => {
      if (Date.now() - busy < 1200) return; // a double click is one wish
      busy = Date.now();
      start.classList.add("busy");
      trigger("generate", { count });
    };
    K5.on("start", () => K5.shown(root) && go());

    const pick = el("input", { type: "file", accept: ".mp4,.png,.webp,.safetensors,.toml", hidden: true, "aria-label": t("js.from_file"), onchange: () => fromFile(pick.files[0]) });
    const fromFile = async (file) => {
      pick.value = "";
      if (!file) return;
      try {
        const { path } = await upload(file);
        trigger("fromfile", { path });
      } catch (error) {
        K5.notice(t("js.upload_failed"), "bad");
      }
    };
    const drop = el("div.k5-drop.k5-tools", {},
      K5.button(t("js.from_file"), () => pick.click(), { icon: "file", kind: "plain" }), pick, tools);
    K5.acceptDrop(drop, fromFile);
    K5.on("settings-file", fromFile);
    const useFrame = async (blob) => {
      try {
        const { path } = await upload(new File([blob], "last-frame.png", { type: "image/png" }));
        trigger("frame", { path });
      } catch (error) {
        K5.notice(t("js.upload_failed"), "bad");
      }
    };
    K5.on("use-frame", useFrame);
    K5.on("use-settings", (clip) => trigger("use", clip));

    const drawSlots = () => {
      fill("drop", drop);
      showHelp();
      fill("weights", el("div.k5-weights" + (state.weights.ok ? ".ok" : ".missing"), {}, el("i.k5-dot"), el("span", {}, state.weights.line),
        state.weights.ok ? null : el("button.k5-link", { type: "button", onclick: () => K5.openTab("settings") }, t("js.to_settings"))));
      fill("examples", ...(state.examples || []).map((example) => chip(example.label, false, () => type("prompt", example.prompt), example.prompt)));
      fill("sizes", ...(state.sizes || []).map((size) =>
        chip(size.label || size.width + "×" + size.height, size.width === state.width && size.height === state.height,
          () => trigger("set", { width: size.width, height: size.height }), size.note)),
        K5.button("", () => trigger("set", { width: state.height, height: state.width }), { icon: "swap", kind: "chip", title: t("js.swap") }));
      fill("lengths", ...(state.lengths || []).map((length) =>
        chip(length.label, length.frames === state.frames, () => trigger("set", { frames: length.frames }))),
        el("span.k5-means", {}, state.means || ""));
      fill("seed",
        K5.button(t("js.dice"), () => trigger("set", { seed: -1 }), { icon: "dice", kind: "chip" + (state.seed === -1 ? " on" : ""), title: t("js.dice_title") }),
        K5.button(state.last_seed === null || state.last_seed === undefined ? t("js.reuse") : t("js.reuse_n", { n: state.last_seed }),
          () => trigger("set", { seed: "last" }), { icon: "again", kind: "chip", title: t("js.reuse_title") }));
    };
    const drawProblems = () => {
      const problems = state.problems || [];
      problemList.replaceChildren(...problems.map((problem) => el("li", {},
        problem.field
          ? el("button.k5-link", { type: "button", onclick: () => focusField(problem.field) }, problem.label || problem.field) : null,
        el("span", {}, " " + problem.message))));
      showProblems(problems);
      set(startText, problems.length ? t("js.generate_problems", { n: problems.length, word: t(plural(problems.length)) }) : t("js.generate"));
      K5.toggle(start, "blocked", problems.length);
    };
    // Fields come into the page when their accordion opens; what is wrong with them is said then.
    let later = 0;
    new MutationObserver(() => {
      clearTimeout(later);
      later = setTimeout(() => {
        showProblems(state.problems || []);
        showHelp();
      }, 60);
    }).observe(root.closest(".k5-form") || root, { subtree: true, childList: true });
    const showHelp = () => {
      for (const [name, text] of Object.entries(state.help || {})) {
        const node = field(name);
        if (node && !node.title) node.title = text;
      }
    };
    const plural = (n) => {
      const rule = new Intl.PluralRules(K5.language).select(n);
      return "js.problem." + rule;
    };
    const act = () => {
      if (state.command) {
        commandBox.hidden = false;
        commandBox.value = state.command;
        commandBox.select();
        K5.copy(state.command);
      } else commandBox.hidden = true;
      if (state.note) K5.notice(state.note, state.note_kind || "");
      if (state.refused) (state.problems || []).slice(0, 1).forEach((problem) => problem.field && focusField(problem.field));
      if (state.submitted && state.submitted.length) K5.emit("submitted", state.submitted);
    };
    let seen = null;
    return {
      update(value) {
        start.classList.remove("busy");
        if (!value || !value.task) return; // before the first answer
        state = value;
        drawSlots();
        drawProblems();
        set(summary, state.summary || "");
        notices.replaceChildren(...(state.notices || []).map((text) => el("p", {}, text)));
        if (state.turn && seen !== state.turn) act();
        seen = state.turn || seen;
        K5.emit("form", state);
      },
    };
  };

  // --- LoRA rows -------------------------------------------------------------------------------------------------
  K5.parts.loras = (root, { trigger, props, upload }) => {
    let rows = [];
    let known = "";
    const body = el("div.k5-lora-rows");
    const add = K5.button(t("js.lora_add"), () => {
      rows.push({ path: "", strength: 1 });
      draw();
      const inputs = body.querySelectorAll("input[type=text]");
      inputs[inputs.length - 1].focus();
    }, { icon: "plus", kind: "plain" });
    const offered = el("datalist", { id: "k5-lora-files" });
    K5.on("form", (state) => offered.replaceChildren(...(state.lora_files || []).map((file) => el("option", { value: file.path }, file.name))));
    root.append(el("div.k5-label", {}, t("js.lora")), body, add, offered);
    const send = () => {
      known = JSON.stringify(rows);
      props.value = rows.map((row) => ({ ...row }));
      trigger("edit");
    };
    const row = (item, index) => {
      const path = el("input.k5-input", { type: "text", value: item.path, placeholder: t("js.lora_path"), list: "k5-lora-files", "aria-label": t("js.lora_path"), spellcheck: "false",
        oninput: () => ((item.path = path.value), send()) });
      const number = el("input.k5-input.k5-strength", { type: "number", step: "0.05", min: "-10", max: "10", value: String(item.strength), "aria-label": t("js.strength"),
        oninput: () => {
          item.strength = Number(number.value);
          slider.value = number.value;
          send();
        } });
      const slider = el("input.k5-slider", { type: "range", min: "0", max: "2", step: "0.05", value: String(item.strength), "aria-label": t("js.strength"),
        oninput: () => {
          item.strength = Number(slider.value);
          number.value = slider.value;
        }, onchange: send });
      const pick = el("input", { type: "file", accept: ".safetensors", hidden: true, onchange: async () => {
        if (!pick.files[0]) return;
        try {
          item.path = (await upload(pick.files[0])).path;
          path.value = item.path;
          send();
        } catch (error) {
          K5.notice(t("js.upload_failed"), "bad");
        }
      } });
      return el("div.k5-lora-row", {}, path,
        K5.button("", () => pick.click(), { icon: "file", title: t("js.lora_upload") }), pick, slider, number,
        K5.button("", () => {
          rows.splice(index, 1);
          draw();
          send();
        }, { icon: "close", kind: "plain", title: t("js.remove") }));
    };
    const draw = () => {
      body.replaceChildren(...rows.map(row));
      add.hidden = rows.length >= 8;
    };
    return {
      update(value) {
        const text = JSON.stringify(value || []);
        if (text === known) return;
        known = text;
        rows = (value || []).map((item) => ({ path: String(item.path || ""), strength: Number(item.strength ?? 1) }));
        draw();
      },
    };
  };

  // --- search among the advanced options -------------------------------------------------------------------------
  K5.parts.search = (root) => {
    const none = el("p.k5-muted", { hidden: true }, t("js.search_none"));
    const input = el("input.k5-input", { type: "search", placeholder: t("js.search"), "aria-label": t("js.search"), oninput: () => filter() });
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const place = document.querySelector(".k5-advanced");
      let left = 0;
      for (const node of place.querySelectorAll(".k5-option")) {
        const text = (node.id + " " + node.textContent).toLowerCase();
        const hit = words.every((word) => text.includes(word));
        node.classList.toggle("k5-hidden", !hit);
        if (hit) left += 1;
      }
      for (const group of place.querySelectorAll(".k5-group")) {
        group.classList.toggle("k5-hidden", !group.querySelector(".k5-option:not(.k5-hidden)"));
      }
      none.hidden = left > 0;
    };
    root.append(input, none);
  };
})();
