/* The settings of a dataset as fields: each change is one key of the TOML file; a problem stands at its field. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;

  // kind of input, then where it applies; "more" is folded away.
  const FIELDS = [
    { key: "resolution", type: "size" },
    { key: "enable_bucket", type: "switch" },
    { key: "bucket_no_upscale", type: "switch", needs: (values) => values.enable_bucket },
    { key: "target_frames", type: "numbers", only: "video", needs: (values) => values.frame_extraction !== "full" },
    { key: "frame_extraction", type: "choice", only: "video", choices: ["head", "chunk", "slide", "uniform", "full"] },
    { key: "frame_stride", type: "number", only: "video", needs: (values) => values.frame_extraction === "slide" },
    { key: "frame_sample", type: "number", only: "video", needs: (values) => values.frame_extraction === "uniform" },
    { key: "max_frames", type: "number", only: "video", needs: (values) => values.frame_extraction === "full" },
    { key: "source_fps", type: "rate", only: "video" },
    { key: "batch_size", type: "number" },
    { key: "num_repeats", type: "number" },
    { key: "caption_prefix", type: "text" },
    { key: "validation_split", type: "share" },
    { key: "caption_extension", type: "text", more: true },
    { key: "caption_dropout", type: "share", more: true },
    { key: "recursive", type: "switch", more: true },
    { key: "cache_directory", type: "text", more: true, wide: true },
    { key: "exclude", type: "lines", more: true, wide: true },
  ];

  const numbers = (text) => text.split(/[\s,;]+/).filter(Boolean).map((part) => (/^-?\d+$/.test(part) ? Number(part) : part));
  const decimal = (text) => (text.trim() === "" ? null : isFinite(text.replace(",", ".")) ? Number(text.replace(",", ".")) : text.trim());

  // An input of its kind: {node, read() -> value for the file, write(value)}.
  const INPUTS = {
    switch: (label, changed) => {
      const box = el("input", { type: "checkbox", "aria-label": label, onchange: changed });
      return { node: el("label.k5-ds-switch", {}, box, el("span", {}, label)), read: () => box.checked, write: (value) => (box.checked = Boolean(value)), own: true, inner: box };
    },
    size: (label, changed) => {
      const make = (name) => el("input.k5-input", { type: "number", min: "32", max: "8192", step: "16", inputmode: "numeric", "aria-label": label + ", " + t("js.ds." + name), onchange: changed });
      const width = make("width");
      const height = make("height");
      const value = (input) => (input.value === "" ? null : Number(input.value));
      return {
        node: el("div.k5-ds-size", {}, width, el("span", { "aria-hidden": "true" }, "×"), height),
        read: () => (value(width) === null || value(height) === null ? null : [value(width), value(height)]),
        write: (value) => {
          [width.value, height.value] = Array.isArray(value) ? value : [value || "", value || ""];
        },
        inner: width,
      };
    },
    number: (label, changed) => {
      const input = el("input.k5-input", { type: "number", min: "1", step: "1", inputmode: "numeric", "aria-label": label, onchange: changed });
      return { node: input, read: () => (input.value === "" ? null : Number(input.value)), write: (value) => (input.value = value === null || value === undefined ? "" : value) };
    },
    share: (label, changed) => {
      const input = el("input.k5-input", { type: "number", min: "0", max: "100", step: "1", inputmode: "decimal", "aria-label": label, onchange: changed });
      return {
        node: el("div.k5-ds-unit", {}, input, el("span", { "aria-hidden": "true" }, "%")),
        read: () => (input.value === "" ? null : Math.round(Number(input.value) * 100) / 10000),
        write: (value) => (input.value = value === null || value === undefined ? "" : Math.round(value * 10000) / 100),
        inner: input,
      };
    },
    numbers: (label, changed) => {
      const input = el("input.k5-input", { type: "text", placeholder: "1, 25, 45", "aria-label": label, onchange: changed });
      return { node: input, read: () => (input.value.trim() === "" ? null : numbers(input.value)), write: (value) => (input.value = (value || []).join(", ")) };
    },
    text: (label, changed) => {
      const input = el("input.k5-input", { type: "text", "aria-label": label, spellcheck: "false", onchange: changed });
      return { node: input, read: () => (input.value === "" ? null : input.value), write: (value) => (input.value = value || "") };
    },
    lines: (label, changed) => {
      const input = el("textarea.k5-input", { rows: 2, "aria-label": label, spellcheck: "false", onchange: changed });
      return {
        node: input,
        read: () => (input.value.trim() ? input.value.split("\n").map((line) => line.trim()).filter(Boolean) : null),
        write: (value) => (input.value = (value || []).join("\n")),
      };
    },
    rate: (label, changed) => {
      const number = el("input.k5-input", { type: "text", inputmode: "decimal", "aria-label": label + ", " + t("js.ds.fps"), hidden: true, onchange: changed });
      const choice = ds.select(label, ["as_is", "auto", "given"].map((key) => [key, t("js.ds.rate." + key)]), "as_is", (value) => {
        number.hidden = value !== "given";
        if (value !== "given") changed();
        else number.focus();
      });
      return {
        node: el("div.k5-ds-unit", {}, choice, number),
        read: () => (choice.value === "as_is" ? null : choice.value === "auto" ? "auto" : decimal(number.value)),
        write: (value) => {
          choice.value = value === null || value === undefined ? "as_is" : value === "auto" ? "auto" : "given";
          number.hidden = choice.value !== "given";
          if (choice.value === "given") number.value = String(value);
        },
        inner: choice,
      };
    },
  };
  INPUTS.choice = (label, changed, field) => {
    const node = ds.select(label, field.choices.map((key) => [key, t("js.ds." + field.key + "." + key)]), field.choices[0], changed);
    return { node, read: () => node.value, write: (value) => (node.value = value) };
  };

  const makeField = (field, change) => {
    const label = t("js.ds.key." + field.key);
    const problem = el("div.k5-ds-problem", { role: "alert", hidden: true });
    const input = INPUTS[field.type](label, () => change(field.key, input.read(), node), field);
    const own = K5.button("", () => change(field.key, null, node), { icon: "again", kind: "plain k5-ds-reset", title: t("js.ds.default_title", { key: field.key }) });
    const help = el("span.k5-small", {}, t("js.ds.help." + field.key));
    const node = el("div.k5-ds-field" + (field.wide ? ".wide" : ""), { "data-key": field.key },
      el("div.k5-ds-field-head", {}, input.own ? input.node : el("span.k5-label", {}, label), own),
      input.own ? null : input.node, problem, help);
    let refused = false; // what was typed and not taken stays until it is corrected
    const refuse = (text) => {
      refused = true;
      say(text);
    };
    const taken = () => {
      refused = false;
      say("");
    };
    const say = (text) => {
      set(problem, text);
      problem.hidden = !text;
      K5.toggle(node, "k5-wrong", text);
    };
    const show = (values, given, problems) => {
      own.hidden = !given.includes(field.key) && !refused;
      K5.toggle(node, "off", field.needs && !field.needs(values));
      node.hidden = Boolean(field.needs && !field.needs(values) && !given.includes(field.key));
      if (refused) return;
      say(problems.map((item) => item.message.charAt(0).toUpperCase() + item.message.slice(1)).join(" "));
      if (!node.contains(document.activeElement) || document.activeElement === own) input.write(values[field.key]);
    };
    return { node, show, refuse, taken };
  };

  const makeEntry = (index, kind, actions) => {
    const where = el("span.k5-ds-source");
    const counted = el("span.k5-small");
    const enabled = el("input", { type: "checkbox", onchange: () => actions.change(index, "enabled", enabled.checked ? null : false) });
    const remove = K5.sureButton(t("js.ds.remove_entry"), () => actions.remove(index), { icon: "close", kind: "plain", title: t("js.ds.remove_entry_title") });
    const problem = el("div.k5-ds-problem", { role: "alert" });
    const fields = FIELDS.filter((field) => !field.only || field.only === kind).map((field) => [field, makeField(field, (key, value, node) => actions.change(index, key, value, node))]);
    const box = el("section.k5-ds-entry", {},
      el("div.k5-ds-entry-head", {}, ds.icon(kind === "video" ? "film" : "image", t("js.ds.kind." + kind)), el("div.k5-ds-name-text", {}, where, counted),
        el("label.k5-ds-switch", {}, enabled, el("span", {}, t("js.ds.enabled"))), remove),
      problem,
      el("div.k5-ds-fields", {}, fields.filter(([field]) => !field.more).map(([, made]) => made.node)),
      el("details", {}, el("summary", {}, t("js.ds.more")), el("div.k5-ds-fields", {}, fields.filter(([field]) => field.more).map(([, made]) => made.node))));
    const show = (entry, problems) => {
      set(where, entry.source);
      where.title = entry.source;
      set(counted, [ds.many("files", entry.sources || 0), ds.many("items", entry.items || 0), entry.steps_per_epoch ? t("js.ds.steps", { n: ds.number(entry.steps_per_epoch) }) : ""].filter(Boolean).join(" · "));
      enabled.checked = entry.enabled;
      K5.toggle(box, "off", !entry.enabled);
      const prefix = "datasets[" + index + "]";
      const known = new Set(fields.map(([field]) => prefix + "." + field.key));
      set(problem, problems.filter((item) => item.field && item.field.startsWith(prefix) && !known.has(item.field)).map(ds.sentence).join("\n"));
      // Of a file that cannot be used yet only what stands in it is known.
      const values = { ...entry.given, ...entry.values };
      const given = Object.keys(entry.given || {});
      for (const [field, made] of fields) made.show(values, given, problems.filter((item) => item.field === prefix + "." + field.key));
    };
    const field = (key) => (fields.find(([one]) => one.key === key) || [])[1];
    return { box, show, kind, field };
  };

  ds.views.setup = (ctx) => {
    const entries = el("div.k5-ds-entries");
    const conflict = el("div.k5-ds-conflict", { hidden: true, role: "alert" }, el("span", {}, t("js.ds.conflict_settings")),
      K5.button(t("js.ds.reload"), () => {
        conflict.hidden = true;
        rows = [];
        ctx.changed();
      }, { icon: "again" }));
    const add = K5.button(t("js.ds.add_folder"), () => ds.folderDialog(ctx, async (folder, kind) => {
      const answer = await ctx.verb("add_entry", ctx.id(), revision, folder, kind);
      return after(answer);
    }), { icon: "plus" });
    const broken = el("p.k5-muted", { hidden: true }, t("js.ds.setup_broken"));
    const box = el("div.k5-ds-setup", {}, el("p.k5-muted", {}, t("js.ds.setup_text")), conflict, broken, entries, el("div.k5-tools", {}, add));
    let rows = [];
    let revision = null;
    let id = null;
    let queue = Promise.resolve();
    const after = (answer) => {
      if (answer.conflict) conflict.hidden = false;
      if (answer.revision) revision = answer.revision;
      if (!answer.error && !answer.problems) ctx.changed();
      return answer;
    };
    // One after the other: each change needs the revision that the one before it made.
    const change = (index, key, value, node) => {
      queue = queue.then(async () => {
        const answer = after(await ctx.verb("set_key", id, revision, index, key, value));
        const row = rows[index];
        const made = row && row.field(key);
        if (answer.problems && made) made.refuse(answer.problems.map((item) => item.message).join(" "));
        else if (answer.problems) K5.notice(answer.problems.map(ds.sentence).join("\n"), "bad");
        if (!answer.problems && made) made.taken();
        if (node && !answer.problems && !answer.error) K5.toggle(node, "saved", true);
        if (node) setTimeout(() => K5.toggle(node, "saved", false), 1200);
      });
      return queue;
    };
    const remove = async (index) => {
      after(await ctx.verb("remove_entry", id, revision, index));
    };
    const update = (detail) => {
      if (detail.id !== id) {
        rows = [];
        conflict.hidden = true;
      }
      id = detail.id;
      revision = detail.revision;
      broken.hidden = detail.entries.length > 0;
      if (rows.length !== detail.entries.length || rows.some((row, index) => row.kind !== detail.entries[index].kind)) {
        rows = detail.entries.map((entry, index) => makeEntry(entry.index === undefined ? index : entry.index, entry.kind, { change, remove }));
        entries.replaceChildren(...rows.map((row) => row.box));
      }
      detail.entries.forEach((entry, index) => rows[index].show(entry, detail.problems));
    };
    return { box, update };
  };
})();
