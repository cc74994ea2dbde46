/* The Items view: search, selection, the grid, and below it the chosen item with its caption. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;
  const ONLY = ["all", "no_caption", "skipped", "excluded", "findings", "image", "video"];

  // The item at work: it plays, and says all that is known about it.
  const makeChosen = (ctx, { step, saved, exclude }) => {
    const screen = el("div.k5-ds-screen");
    const name = el("strong.k5-ds-chosen-name");
    const facts = el("div.k5-small");
    const troubles = el("ul.k5-ds-troubles");
    const editor = ds.captionEditor(ctx, { saved });
    const seen = K5.button(t("js.ds.view.seen"), () => ctx.open("seen"), { icon: "eye", kind: "plain" });
    const out = K5.button(t("js.ds.exclude"), () => item && exclude([item.key], !item.excluded), { icon: "hide", kind: "plain" });
    const box = el("section.k5-ds-chosen", { "aria-label": t("js.ds.chosen"), hidden: true }, screen,
      el("div.k5-ds-chosen-text", {},
        el("div.k5-row", {}, name, el("span.k5-grow"),
          K5.button("", () => step(-1), { icon: "left", kind: "plain", title: t("js.ds.previous") }),
          K5.button("", () => step(1), { icon: "right", kind: "plain", title: t("js.ds.next") })),
        facts, troubles, editor.box, el("div.k5-tools", {}, seen, out)));
    let item = null;
    let drawn = "";
    let stop = () => {};
    const draw = () => {
      set(name, item.name);
      name.title = item.name;
      const clips = (item.clips || []).slice(0, 3).map((clip) => t(item.kind === "video" ? "js.ds.clip_size" : "js.ds.image_size", { w: clip.width, h: clip.height, f: clip.frames, n: clip.start }));
      set(facts, [ds.facts(item), item.kind === "video" && ds.clipCount(item) > 1 ? ds.many("clips", ds.clipCount(item)) : "", item.bytes ? ds.bytes(item.bytes) : "", clips.length ? t("js.ds.becomes", { what: clips.join(", ") + (ds.clipCount(item) > 3 ? " …" : "") }) : ""].filter(Boolean).join(" · "));
      seen.disabled = !clips.length;
      const label = t(item.excluded ? "js.ds.include" : "js.ds.exclude");
      set(out.lastChild, label);
      out.setAttribute("aria-label", label);
      troubles.replaceChildren(...[
        item.reason ? el("li.warn", {}, item.reason) : null,
        ...item.findings.map((finding) => el("li." + finding.severity, {}, el("button.k5-link", { type: "button", onclick: () => ctx.open("lint", { kind: finding.kind }) }, t("js.ds.kind_name." + finding.kind)))),
      ].filter(Boolean));
    };
    const show = (next) => {
      box.hidden = !next;
      editor.show(next);
      if (!next) {
        stop();
        item = null;
        drawn = "";
        return;
      }
      const other = !item || item.key !== next.key || item.thumb !== next.thumb;
      item = next;
      const mark = JSON.stringify(next);
      if (mark !== drawn) draw();
      drawn = mark;
      if (other) {
        stop();
        screen.replaceChildren(ds.picture(item));
        stop = ds.playOver(screen, item);
      }
    };
    screen.addEventListener("click", () => {
      const video = screen.querySelector("video");
      if (video) video[video.paused ? "play" : "pause"]();
    });
    return { box, show, editor, stop: () => (stop(), (drawn = ""), (item = null)) };
  };

  ds.views.items = (ctx) => {
    const query = { text: "", only: "all", entry: "" };
    let id = null;
    const count = el("span.k5-small.k5-ds-total", { role: "status" });
    const search = el("input.k5-input", { type: "search", placeholder: t("js.ds.search"), "aria-label": t("js.ds.search") });
    const only = ds.select(t("js.ds.show"), ONLY.map((key) => [key, t("js.ds.only." + key)]), "all", (value) => {
      query.only = value;
      grid.reload(true);
    });
    const entry = ds.select(t("js.ds.entry"), [["", ""]], "", (value) => {
      query.entry = value;
      grid.reload(true);
    });
    entry.hidden = true;
    const later = ds.debounce(() => {
      if (query.text === search.value.trim()) return;
      query.text = search.value.trim();
      grid.reload(true);
    }, 300);
    search.addEventListener("input", later);

    const picked = el("span.k5-small.k5-ds-picked");
    const out = K5.button(t("js.ds.exclude"), () => exclude([...grid.selected.keys()], true), { icon: "hide", kind: "plain" });
    const back = K5.button(t("js.ds.include"), () => exclude([...grid.selected.keys()], false), { icon: "eye", kind: "plain" });
    const all = K5.button(t("js.ds.select_all"), () => grid.all(), { kind: "plain" });
    const change = K5.button(t("js.ds.change_captions"), () => chosen.editor.save().then(() => {
      const many = grid.selected.size > 1 && grid.selected.size < grid.total();
      ds.changeDialog(ctx, many ? [...grid.selected.keys()] : null, changed);
    }), { icon: "text", kind: "plain" });
    const undo = K5.button(t("js.ds.undo"), () => journal("undo_captions"), { icon: "undo", kind: "plain", title: t("js.ds.undo_title") });
    const redo = K5.button(t("js.ds.redo"), () => journal("redo_captions"), { icon: "redo", kind: "plain", title: t("js.ds.redo_title") });

    const changed = () => {
      grid.reload(false);
      ctx.changed();
    };
    const exclude = async (keys, on) => {
      if (!keys.length) return;
      const answer = await ctx.verb("exclude", ctx.id(), keys, on);
      if (answer.conflict) K5.notice(answer.error, "bad");
      if (answer.problems) K5.notice(answer.problems.map(ds.sentence).join("\n"), "bad");
      changed();
    };
    const journal = async (verb) => {
      await chosen.editor.save();
      const answer = await ctx.verb(verb, ctx.id());
      if (!answer.error) K5.notice(answer.changed ? t("js.ds." + verb, { what: ds.many("captions", answer.changed) }) : t("js.ds.nothing_to_" + verb));
      changed();
    };
    const ask = (offset, limit) => {
      const values = new URLSearchParams({ offset, limit, text: query.text, only: query.only });
      if (query.entry !== "") values.set("entry", query.entry);
      return K5.get(ctx.path("/items?" + values));
    };
    const chosen = makeChosen(ctx, { step: (by) => grid.move(grid.current() + by), saved: () => undo.removeAttribute("disabled"), exclude });
    const grid = ds.grid({
      ask,
      chosen: (item) => {
        if (!item) return;
        ctx.setCurrent(item);
        chosen.show(item);
      },
      picked: (selected) => {
        const n = selected.size;
        set(picked, n > 1 ? t("js.ds.selected", { n: ds.number(n) }) : "");
        out.disabled = back.disabled = n === 0;
      },
      counted: (total) => {
        set(count, ds.many("files", total));
        if (!total) chosen.show(null);
      },
    });
    out.disabled = back.disabled = true;
    grid.box.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        if (event.ctrlKey || event.metaKey) event.stopPropagation();
        chosen.editor.focus();
      }
    });
    const box = el("div.k5-ds-items", {},
      el("div.k5-ds-bar", {}, el("div.k5-ds-search", {}, K5.icon("search"), search), only, entry, el("span.k5-grow"), count),
      el("div.k5-ds-bar.k5-ds-actions", {}, all, out, back, picked, el("span.k5-grow"), change, undo, redo),
      grid.box, chosen.box);

    const fillEntries = (detail) => {
      const names = detail.entries.map((one) => one.source.split(/[\\/]/).filter(Boolean).pop() || one.source);
      const mark = names.join("\n");
      entry.hidden = names.length < 2;
      if (entry.dataset.mark === mark) return;
      entry.dataset.mark = mark;
      entry.replaceChildren(el("option", { value: "" }, t("js.ds.all_folders")),
        ...names.map((name, index) => el("option", { value: String(index) }, t("js.ds.kind." + detail.entries[index].kind) + ": " + name)));
      entry.value = query.entry;
    };
    const update = (detail, opened) => {
      if (!detail.scanned) return; // the first look goes on; the head says how far
      const other = id !== detail.id;
      id = detail.id;
      if (other) {
        Object.assign(query, { text: "", only: "all", entry: "" });
        search.value = "";
        only.value = "all";
        chosen.show(null);
      }
      fillEntries(detail);
      const seek = opened && ctx.seek;
      if (seek) {
        Object.assign(query, { text: seek.text || "", only: seek.only || "all", entry: "" });
        search.value = query.text;
        only.value = query.only;
        entry.value = "";
        ctx.seek = null;
      }
      grid.measure();
      grid.reload(Boolean(other || seek));
    };
    const hide = () => {
      chosen.editor.save();
      grid.stop();
      chosen.stop();
    };
    const escape = () => {
      if (grid.selected.size > 1) grid.clear();
      else if (box.contains(document.activeElement)) grid.box.focus();
    };
    return { box, update, hide, escape };
  };
})();
