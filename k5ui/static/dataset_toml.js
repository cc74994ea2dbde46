/* The TOML file itself, as text: comments and everything unknown stay; a change from outside is never overwritten. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;

  ds.views.toml = (ctx) => {
    const text = el("textarea.k5-command.k5-ds-toml", { spellcheck: "false", autocapitalize: "off", "aria-label": t("js.ds.view.toml"), wrap: "off" });
    const status = el("span.k5-small", { role: "status", "aria-live": "polite" });
    const problems = el("ul.k5-ds-problems");
    const conflict = el("div.k5-ds-conflict", { hidden: true, role: "alert" },
      el("div", {}, el("strong", {}, t("js.ds.conflict_title")), el("p", {}, t("js.ds.conflict_toml"))),
      el("div.k5-tools", {}, K5.button(t("js.ds.reload"), () => take(), { icon: "again" }), K5.button(t("js.ds.keep_mine"), () => keepMine())));
    const save = ds.primary(t("js.ds.save"), () => store());
    const revert = K5.button(t("js.ds.revert"), () => take(), { kind: "plain" });
    const box = el("div.k5-ds-toml-view", {}, el("p.k5-muted", {}, t("js.ds.toml_text")), conflict, text, problems,
      el("div.k5-row", {}, save, revert, status, el("span.k5-grow"), el("span.k5-small.k5-ds-keys", {}, t("js.ds.toml_keys"))));
    let id = null;
    let revision = null;
    let stored = "";
    let latest = null;
    const dirty = () => text.value !== stored;
    const mark = () => {
      save.disabled = revert.disabled = !dirty();
      if (dirty()) set(status, t("js.ds.unsaved"));
    };
    const take = () => {
      if (!latest) return;
      conflict.hidden = true;
      problems.replaceChildren();
      stored = latest.text || "";
      revision = latest.revision;
      // The place of the cursor survives a change that comes from the settings or from outside.
      const at = [text.selectionStart, text.scrollTop];
      text.value = stored;
      if (document.activeElement === text) text.setSelectionRange(at[0], at[0]);
      text.scrollTop = at[1];
      set(status, "");
      mark();
    };
    const keepMine = () => {
      conflict.hidden = true;
      revision = latest.revision;
      store();
    };
    const store = async () => {
      save.disabled = true;
      const wanted = text.value;
      const answer = await ctx.verb("save_text", id, revision, wanted);
      if (answer.conflict) {
        latest = await K5.get(ctx.path("")).catch(() => latest);
        conflict.hidden = false;
        mark();
        return;
      }
      problems.replaceChildren(...(answer.problems || []).map((problem) => el("li", {}, ds.sentence(problem))));
      if (answer.revision) {
        revision = answer.revision;
        stored = wanted;
        set(status, t(answer.problems && answer.problems.length ? "js.ds.saved_with_problems" : "js.ds.saved"));
        ctx.changed();
      } else set(status, t("js.ds.not_saved"));
      mark();
    };
    text.addEventListener("input", mark);
    text.addEventListener("keydown", (event) => {
      const command = event.ctrlKey || event.metaKey;
      if (command && (event.key.toLowerCase() === "s" || event.key === "Enter")) {
        event.preventDefault();
        event.stopPropagation();
        if (dirty()) store();
      }
    });
    const update = (detail) => {
      const other = detail.id !== id;
      id = detail.id;
      latest = detail;
      if (other || (!dirty() && detail.revision !== revision)) take();
      else if (dirty() && detail.revision !== revision) conflict.hidden = false;
      if (!dirty()) problems.replaceChildren(...detail.problems.map((problem) => el("li", {}, ds.sentence(problem))));
    };
    mark();
    return { box, update };
  };
})();
