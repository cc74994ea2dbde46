/* Two runs side by side: which options differ, by group, and which of the values are defaults. */
(() => {
  "use strict";
  const { el, set, t } = K5;

  const shown = (value) => {
    if (value === null || value === undefined) return t("js.live.not_set");
    if (value === true || value === false) return t(value ? "js.live.on" : "js.live.off");
    if (Array.isArray(value)) return value.length ? value.join("\n") : t("js.live.not_set");
    return String(value);
  };
  const groupName = (name) => {
    const key = "js.live.group." + name.toLowerCase();
    return t(key) === key ? name : t(key);
  };

  K5.compareRuns = (id, runs, with_) => {
    const before = document.activeElement;
    const pick = (label) => el("select.k5-input", { "aria-label": label, onchange: () => load() });
    const [a, b] = [pick(t("js.live.run_a")), pick(t("js.live.run_b"))];
    const note = el("p.k5-muted");
    const table = el("table.k5-table.k5-diff");
    const box = el("dialog.k5-dialog.k5-root.k5-compare", { "aria-label": t("js.live.compare_runs") },
      el("div.k5-row", {}, el("strong", {}, t("js.live.compare_runs")), el("span.k5-grow"), K5.button("", () => close(), { icon: "close", kind: "plain", title: t("js.close") })),
      el("div.k5-compare-pick", {}, a, b), note, el("div.k5-scroll", {}, table));
    for (const select of [a, b]) select.append(...runs.map((run) => el("option", { value: run.id }, (run.kind && run.kind !== "train" ? t("js.kind." + run.kind) + ": " : "") + (run.title || run.id) + " · " + K5.moment(run.created))));
    a.value = id || (runs[0] && runs[0].id) || "";
    b.value = with_ || (runs.find((run) => run.id !== a.value) || {}).id || a.value;
    const close = () => {
      if (box.open) box.close();
      box.remove();
      if (before && before.isConnected) before.focus();
    };
    box.addEventListener("cancel", (event) => (event.preventDefault(), close()));
    box.addEventListener("click", (event) => event.target === box && close());
    box.addEventListener("keydown", (event) => event.key === "Escape" && (event.preventDefault(), event.stopPropagation(), close()));
    const cell = (value, isDefault) => el("td", {}, el("span", {}, shown(value)), isDefault ? el("small.k5-muted", {}, " " + t("js.live.default")) : null);
    const load = async () => {
      if (!a.value || !b.value) return;
      const wanted = [a.value, b.value];
      let answer;
      try {
        answer = await K5.get("live/compare?" + new URLSearchParams({ a: a.value, b: b.value }));
      } catch (error) {
        set(note, t("js.live.compare_failed"));
        table.replaceChildren();
        return;
      }
      if (wanted[0] !== a.value || wanted[1] !== b.value) return;
      const rows = answer.rows;
      set(note, a.value === b.value ? t("js.live.compare_same") : rows.length ? t("js.live.compare_count", { n: rows.length }) : t("js.live.compare_none"));
      const nodes = [];
      let group = null;
      for (const row of rows) {
        if (row.group !== group) {
          group = row.group;
          nodes.push(el("tr.group", {}, el("th", { colSpan: 3, scope: "colgroup" }, groupName(group))));
        }
        nodes.push(el("tr", {}, el("th", { scope: "row" }, row.name, row.unit ? el("small.k5-muted", {}, " " + row.unit) : null), cell(row.a, row.a_default), cell(row.b, row.b_default)));
      }
      table.replaceChildren(el("tbody", {}, nodes));
    };
    document.body.append(box);
    box.showModal();
    load();
  };
})();
