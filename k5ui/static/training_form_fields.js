/* Fields of the training form, made from the definition of an option: one renderer for all kinds. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const TYPING_MS = 500;
  let number = 0;

  const shownNumber = (value) => (typeof value === "number" ? String(value) : value === null || value === undefined ? "" : String(value));
  // What was typed, as the option takes it; text that is no number goes to the server, which says so at the field.
  const parse = (spec, text) => {
    const clean = text.trim();
    if (!clean) return null;
    if (spec.kind !== "int" && spec.kind !== "float") return clean;
    const value = Number(clean.replace(",", "."));
    return Number.isFinite(value) ? value : clean;
  };
  const parseLines = (spec, text) => {
    const values = text.split("\n").map((line) => parse(spec, line)).filter((value) => value !== null);
    return values.length ? values : null;
  };
  const defaultText = (spec) => {
    if (spec.list) return t("js.train.lines");
    if (spec.default === null || spec.default === "") return t("js.train.default");
    return shownNumber(spec.default);
  };
  const range = (spec) => {
    const { minimum, maximum } = spec;
    if (minimum === null || maximum === null || maximum > 1e6) return "";
    return shownNumber(minimum) + " … " + shownNumber(maximum);
  };

  // Sends what is typed after a pause, and at once when the field is left.
  const typed = (input, send) => {
    let timer = 0;
    let waits = false;
    const now = () => {
      clearTimeout(timer);
      if (waits) send();
      waits = false;
    };
    input.addEventListener("input", () => {
      waits = true;
      clearTimeout(timer);
      timer = setTimeout(now, TYPING_MS);
    });
    input.addEventListener("change", now);
    return { now, waits: () => waits };
  };

  const makeInput = (spec, id, send) => {
    if (spec.kind === "bool") {
      const input = el("input", { type: "checkbox", id, onchange: () => send(input.checked === spec.default ? null : input.checked) });
      return { input, put: (value) => { input.checked = value === undefined ? spec.default : value === true; }, busy: () => false, flush: () => {} };
    }
    if (spec.kind === "choice") {
      const input = el("select.k5-input", { id, onchange: () => send(input.value === (spec.default || "") ? null : input.value) },
        spec.choices.map(([label, value]) => el("option", { value }, label)));
      return { input, put: (value) => { input.value = value === undefined ? spec.default || "" : String(value); }, busy: () => document.activeElement === input, flush: () => {} };
    }
    const input = spec.list
      ? el("textarea.k5-input", { id, rows: 2, spellcheck: "false", placeholder: defaultText(spec) })
      : el("input.k5-input", { id, type: "text", spellcheck: "false", autocomplete: "off", placeholder: defaultText(spec),
        inputmode: spec.kind === "int" ? "numeric" : spec.kind === "float" ? "decimal" : null });
    const typing = typed(input, () => send((spec.list ? parseLines : parse)(spec, input.value)));
    const put = (value) => { input.value = value === undefined ? "" : Array.isArray(value) ? value.map(shownNumber).join("\n") : shownNumber(value); };
    return { input, put, busy: () => typing.waits() || document.activeElement === input, flush: typing.now };
  };

  const flag = (name) => el("code.k5-t-flag", {}, "--" + name);
  const resetButton = (action) => K5.button("", action, { icon: "again", kind: "plain k5-t-reset", title: t("js.train.back") });

  // One option: label, flag, input, help, problems. `brief` leaves the help to the tooltip.
  const makeField = (spec, change, { brief = false, place = "" } = {}) => {
    const id = "k5-t-" + place + spec.name;
    const part = makeInput(spec, id, (value) => change(spec.name, value));
    const trouble = el("div.k5-t-trouble", { role: "alert", hidden: true, id: id + "-trouble" });
    part.input.setAttribute("aria-describedby", id + "-trouble");
    const bounds = range(spec);
    const help = spec.help + (bounds ? " " + bounds : "");
    const label = el("label", { for: id, title: help }, spec.label);
    const reset = resetButton(() => {
      part.put(undefined);
      change(spec.name, null);
    });
    const head = el("div.k5-t-head", {}, spec.kind === "bool" ? part.input : null, label, flag(spec.name), el("span.k5-grow"), reset);
    const unit = spec.unit ? el("span.k5-t-unit", {}, spec.unit) : null;
    const body = spec.kind === "bool" ? null : unit ? el("div.k5-t-with-unit", {}, part.input, unit) : part.input;
    const box = el("div.k5-t-option" + (spec.kind === "bool" ? ".switch" : ""), { id: "k5-t-box-" + place + spec.name },
      head, body, brief || !help ? null : el("p.k5-small", {}, help), trouble);
    const show = (value) => {
      K5.toggle(box, "changed", value !== undefined);
      if (!part.busy()) part.put(value);
    };
    return { spec, box, show, complain: complainer(box, trouble), focus: () => part.input.focus(), flush: part.flush,
      text: (spec.label + " " + spec.name + " " + help).toLowerCase() };
  };

  const complainer = (box, trouble) => (messages) => {
    set(trouble, messages.join(" "));
    trouble.hidden = !messages.length;
    K5.toggle(box, "k5-wrong", messages.length);
  };

  // A length in epochs or in steps: one number, one unit, two options of which the other one is emptied.
  const makePair = (label, specs, units, change, first) => {
    number += 1;
    const id = "k5-t-pair-" + number;
    let values = {};
    let chosen = first;
    const input = el("input.k5-input", { id, type: "text", inputmode: "numeric", autocomplete: "off" });
    const select = el("select.k5-input", { "aria-label": label }, Object.keys(specs).map((unit) => el("option", { value: unit }, units[unit])));
    const code = flag("");
    const also = el("div.k5-small", { hidden: true });
    const trouble = el("div.k5-t-trouble", { role: "alert", hidden: true });
    const names = Object.values(specs).map((spec) => spec.name);
    const reset = resetButton(() => {
      input.value = "";
      for (const name of names) if (values[name] !== undefined) change(name, null);
    });
    const box = el("div.k5-t-option", { id: "k5-t-box-" + names[0] }, el("div.k5-t-head", {}, el("label", { for: id }, label), code, el("span.k5-grow"), reset),
      el("div.k5-t-pair", {}, input, select), also, trouble);
    const send = () => change(specs[chosen].name, parse(specs[chosen], input.value));
    const typing = typed(input, send);
    const draw = () => {
      select.value = chosen;
      set(code, "--" + specs[chosen].name);
      const usual = specs[chosen].default;
      input.placeholder = usual === null ? "–" : shownNumber(usual);
      const other = Object.keys(specs).find((unit) => unit !== chosen && values[specs[unit].name] !== undefined);
      also.hidden = !other;
      if (other) set(also, "+ " + shownNumber(values[specs[other].name]) + " " + units[other] + " (--" + specs[other].name + ")");
    };
    select.addEventListener("change", () => {
      typing.now();
      const old = specs[chosen];
      chosen = select.value;
      const value = parse(specs[chosen], input.value);
      if (values[old.name] !== undefined || value !== null) {
        change(old.name, null);
        change(specs[chosen].name, value);
        values = { ...values, [old.name]: undefined, [specs[chosen].name]: value === null ? undefined : value };
      }
      draw();
    });
    const show = (given) => {
      values = given;
      K5.toggle(box, "changed", names.some((name) => given[name] !== undefined));
      if (!typing.waits() && document.activeElement !== input && document.activeElement !== select) {
        const set_ = Object.keys(specs).find((unit) => given[specs[unit].name] !== undefined);
        if (set_ && given[specs[chosen].name] === undefined) chosen = set_;
        input.value = shownNumber(given[specs[chosen].name]);
      }
      draw();
    };
    return { box, show, names, complain: complainer(box, trouble), focus: () => input.focus(), flush: typing.now };
  };

  K5.trainFields = { makeField, makePair, typed, flag };
})();
