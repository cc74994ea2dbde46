/* Captions: the editor of one, saved as one types and never over a change from outside; and changing many at once. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;
  const WAIT = 900; // milliseconds without a key before a caption is saved

  // `conflicted` is answered by the server when the file is no longer what the page has read.
  ds.captionEditor = (ctx, { saved }) => {
    const text = el("textarea.k5-input.k5-ds-caption", { rows: 4, "aria-label": t("js.ds.caption"), placeholder: t("js.ds.caption_empty") });
    const status = el("span.k5-small.k5-ds-saved", { role: "status", "aria-live": "polite" });
    const theirs = el("blockquote.k5-ds-theirs");
    const conflict = el("div.k5-ds-conflict", { hidden: true, role: "alert" },
      el("div", {}, el("strong", {}, t("js.ds.conflict_title")), el("p", {}, t("js.ds.conflict_caption")), theirs),
      el("div.k5-tools", {}, K5.button(t("js.ds.take_theirs"), () => settle(false)), K5.button(t("js.ds.keep_mine"), () => settle(true))));
    const box = el("div.k5-ds-editor", {}, text, conflict, el("div.k5-row", {}, status, el("span.k5-grow"), el("span.k5-small.k5-ds-keys", {}, t("js.ds.caption_keys"))));
    let item = null;
    let revision = null;
    let stored = "";
    let other = null; // what stands in the file after a conflict: {caption, revision}
    let saving = Promise.resolve();
    let savedAt = 0;
    let onTheWay = 0; // saves that the server has not answered yet
    const dirty = () => item && text.value !== stored;
    const later = ds.debounce(() => save(), WAIT);
    const say = (key) => set(status, key ? t(key) : "");

    const save = () => {
      later.cancel();
      if (!dirty() || other || !item.caption_editable) return saving;
      const of = item;
      const wanted = text.value;
      stored = wanted;
      const dataset = ctx.id();
      const here = () => item && item.key === of.key;
      say("js.ds.saving");
      onTheWay += 1;
      saving = saving.then(async () => {
        const answer = await ctx.verb("set_caption", dataset, of.key, here() ? revision : of.caption_revision, wanted);
        onTheWay -= 1;
        if (answer.conflict) {
          if (!here()) K5.notice(t("js.ds.conflict_elsewhere", { name: of.name }), "bad");
          else await quarrel(answer);
        } else if (answer.error || answer.problems) {
          if (here()) {
            stored = null; // not on disk: the next key or Ctrl+Enter tries again
            say("js.ds.not_saved");
            if (answer.problems) K5.notice(answer.problems.map(ds.sentence).join("\n"), "bad");
          }
        } else {
          of.caption = wanted;
          of.caption_revision = answer.caption_revision;
          if (here()) {
            revision = item.caption_revision = answer.caption_revision;
            savedAt = Date.now();
            if (!dirty()) say("js.ds.saved");
          }
          saved(of);
        }
      });
      return saving;
    };
    const quarrel = async (answer) => {
      other = "caption" in answer ? { caption: answer.caption || "", revision: answer.caption_revision } : await reread();
      stored = other.caption;
      set(theirs, other.caption || t("js.ds.caption_gone"));
      conflict.hidden = false;
      say("js.ds.not_saved");
    };
    const reread = async () => {
      const page = await K5.get(ctx.path("/items?limit=200&text=" + encodeURIComponent(item.name)));
      const found = page.items.find((one) => one.key === item.key) || {};
      return { caption: found.caption || "", revision: found.caption_revision === undefined ? null : found.caption_revision };
    };
    const settle = (mine) => {
      const found = other;
      other = null;
      conflict.hidden = true;
      revision = found.revision;
      item.caption_revision = found.revision;
      stored = found.caption;
      if (mine) save();
      else {
        text.value = found.caption;
        item.caption = found.caption;
        say("js.ds.taken");
        saved(item);
      }
      text.focus();
    };
    const show = (next) => {
      if (next && item && next.key === item.key) {
        // Fresh data of the same item: what is being typed wins, and the conflict shows itself when it is saved. An
        // answer that was on its way while the caption was saved is older than the caption.
        if (other || onTheWay || dirty() || next.caption_revision === revision || Date.now() - savedAt < 1500) {
          item = Object.assign(next, { caption_revision: revision });
          return;
        }
      } else save();
      item = next;
      other = null;
      conflict.hidden = true;
      stored = text.value = next ? next.caption || "" : "";
      revision = next ? next.caption_revision : null;
      text.disabled = !next || !next.caption_editable;
      box.title = next && !next.caption_editable ? t("js.ds.caption_fixed") : "";
      say(next && !next.caption_editable ? "js.ds.caption_fixed" : "");
    };
    text.addEventListener("input", () => {
      say(other ? "js.ds.not_saved" : "js.ds.typing");
      later();
    });
    text.addEventListener("blur", () => save());
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        event.stopPropagation();
        save();
      }
    });
    window.addEventListener("beforeunload", () => save());
    return { box, show, save, focus: () => text.focus(), dirty };
  };

  // --- many at once ----------------------------------------------------------------------------------------------
  // `keys` null means all items of the dataset. Nothing is written before the preview has been seen.
  ds.changeDialog = (ctx, keys, done) => {
    const input = (label, more) => el("input.k5-input", { type: "text", "aria-label": label, spellcheck: "false", oninput: () => touched(), ...more });
    const find = input(t("js.ds.find"));
    const replace = input(t("js.ds.replace"));
    const prefix = input(t("js.ds.prefix"));
    const suffix = input(t("js.ds.suffix"));
    const regex = el("input", { type: "checkbox", onchange: () => touched() });
    const result = el("div.k5-ds-preview", { "aria-live": "polite" });
    const trouble = el("div.k5-ds-problem", { role: "alert" });
    const values = () => ({ find: find.value, replace: replace.value, regex: regex.checked, prefix: prefix.value, suffix: suffix.value });
    const empty = () => !find.value && !prefix.value && !suffix.value;
    let asked = 0;
    const show = (answer) => {
      const rows = (answer.examples || []).map((example) => el("div.k5-ds-example", {},
        el("span.k5-small", {}, example.name), el("del", {}, example.before || t("js.ds.caption_empty_short")), el("ins", {}, example.after)));
      const rest = (answer.changed || 0) - rows.length;
      result.replaceChildren(el("strong", {}, answer.changed ? t("js.ds.would_change", { what: ds.many("captions", answer.changed) }) : t("js.ds.would_change_none")), ...rows,
        ...(rest > 0 && rows.length ? [el("p.k5-small", {}, t("js.ds.and_more", { n: ds.number(rest) }))] : []));
      go.disabled = !answer.changed;
    };
    const look = async () => {
      const turn = (asked += 1);
      set(trouble, "");
      go.disabled = true;
      if (empty()) {
        result.replaceChildren(el("p.k5-muted", {}, t("js.ds.change_hint")));
        return;
      }
      let answer;
      try {
        answer = await ctx.server.change_captions([ctx.id(), null, keys, values(), true]);
      } catch (error) {
        answer = { error: t("js.unreachable") };
      }
      if (turn !== asked || !node.isConnected) return;
      if (answer.error || answer.problems) {
        set(trouble, answer.error || answer.problems.map(ds.sentence).join("\n"));
        result.replaceChildren();
      } else show(answer);
    };
    const later = ds.debounce(look, 300);
    // What stands in the fields is not what the preview shows until it has been asked for again.
    const touched = () => {
      asked += 1;
      go.disabled = true;
      later();
    };
    const go = ds.primary(t("js.ds.change"), async () => {
      go.disabled = true;
      const answer = await ctx.verb("change_captions", ctx.id(), null, keys, values(), false);
      if (answer.error || answer.problems) {
        go.disabled = false;
        return;
      }
      node.close();
      const left = typeof answer.conflicts === "number" ? answer.conflicts : (answer.conflicts || []).length;
      K5.notice(t("js.ds.changed", { what: ds.many("captions", answer.changed) }) + (left ? " " + t("js.ds.changed_left", { n: left }) : ""));
      done();
    });
    go.disabled = true;
    const node = ds.dialog(ctx.root, t(keys ? "js.ds.change_some" : "js.ds.change_all", { n: keys ? ds.number(keys.length) : "" }),
      el("div.k5-ds-fields", {}, ds.labelled(t("js.ds.find"), find), ds.labelled(t("js.ds.replace"), replace)),
      el("label.k5-ds-switch", {}, regex, el("span", {}, t("js.ds.regex"))),
      el("div.k5-ds-fields", {}, ds.labelled(t("js.ds.prefix"), prefix), ds.labelled(t("js.ds.suffix"), suffix)),
      trouble, result,
      el("div.k5-dialog-foot", {}, K5.button(t("js.ds.cancel"), () => node.close()), go));
    find.focus();
    look();
  };
})();
