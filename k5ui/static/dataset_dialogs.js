/* The dialogs of the Dataset tab: a new dataset from a folder, opening a TOML, another folder; and the folder chooser. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;

  // A modal box of the browser's own: it holds the focus, Esc closes it, and it goes away when it is closed.
  ds.dialog = (host, title, ...content) => {
    const close = K5.button("", () => node.close(), { icon: "close", kind: "plain", title: t("js.close") });
    const node = el("dialog.k5-dialog", { "aria-label": title },
      el("div.k5-dialog-head", {}, el("strong", {}, title), close), ...content);
    node.addEventListener("close", () => node.remove());
    node.addEventListener("keydown", (event) => {
      // Keys of a dialog are not keys of the page behind it; Escape stays the browser's.
      event.stopPropagation();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        const go = node.querySelector(".k5-primary");
        if (go && !go.disabled) go.click();
      }
    });
    host.append(node);
    node.showModal();
    return node;
  };
  ds.primary = (label, action) => el("button.k5-button.k5-primary", { type: "button", onclick: action }, label);
  ds.labelled = (label, input, help) => el("label.k5-ds-field", {}, el("span.k5-label", {}, label), input, help ? el("span.k5-small", {}, help) : null);

  const counts = (folder) => [folder.videos ? ds.many("videos", folder.videos) : "", folder.images ? ds.many("images", folder.images) : ""].filter(Boolean).join(" · ");

  // Walks through the folders of the machine that the app runs on. `look(page, counts)` is told where it stands.
  ds.chooser = ({ files, look, pick }) => {
    const address = el("input.k5-input", { type: "text", "aria-label": t("js.ds.path"), spellcheck: "false", autocomplete: "off" });
    const up = K5.button("", () => page && page.parent && go(page.parent), { icon: "up", title: t("js.ds.up") });
    const list = el("div.k5-ds-folders", { role: "list" });
    const trouble = el("div.k5-ds-problem", { role: "alert" });
    let page = null;
    let asked = 0;
    const known = {};
    const go = async (path) => {
      const turn = (asked += 1);
      const before = address.value;
      try {
        const answer = await K5.get("folders" + (path ? "?path=" + encodeURIComponent(path) : ""));
        if (turn !== asked) return;
        page = answer;
        set(trouble, "");
        if (address.value === before) address.value = page.path; // what is being typed is not replaced
        up.disabled = !page.parent;
        for (const folder of page.folders) known[folder.path] = folder;
        draw();
        look(page, { ...known[page.path], ...("videos" in page ? { videos: page.videos, images: page.images } : {}) });
      } catch (error) {
        if (turn === asked) set(trouble, t("js.ds.no_folder"));
      }
    };
    const draw = () => {
      const rows = page.folders.map((folder) => el("button.k5-ds-folder", { type: "button", onclick: () => go(folder.path) },
        K5.icon("folder"), el("span.k5-ds-folder-name", {}, folder.name), el("span.k5-small", {}, counts(folder))));
      const named = files ? (page.files || []).map((name) => el("button.k5-ds-folder.file", { type: "button", onclick: () => pick(join(page.path, name)) },
        K5.icon("file"), el("span.k5-ds-folder-name", {}, name))) : [];
      const none = !rows.length && !named.length ? [el("p.k5-muted", {}, t(files ? "js.ds.no_files_here" : "js.ds.no_folders_here"))] : [];
      list.replaceChildren(...named, ...rows, ...none);
      list.scrollTop = 0;
    };
    const join = (folder, name) => folder + (/[\\/]$/.test(folder) ? "" : folder.includes("\\") ? "\\" : "/") + name;
    address.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      if (files && /\.(toml|json)$/i.test(address.value.trim())) pick(address.value.trim());
      else go(address.value.trim());
    });
    go("");
    return { box: el("div.k5-ds-chooser", {}, el("div.k5-row", {}, up, address), trouble, list), typed: () => address.value.trim(), go };
  };

  const showTrouble = (node, answer) => set(node, answer.problems ? answer.problems.map(ds.sentence).join("\n") : answer.error || "");

  ds.newDialog = (ctx, done) => {
    const name = el("input.k5-input", { type: "text", placeholder: t("js.ds.name_default"), maxlength: "80" });
    const found = el("p.k5-ds-found", { "aria-live": "polite" });
    const trouble = el("div.k5-ds-problem", { role: "alert" });
    const make = ds.primary(t("js.ds.create"), async () => {
      make.disabled = true;
      const answer = await ctx.verb("new_dataset", chooser.typed(), name.value.trim() || null);
      make.disabled = false;
      if (answer.id) {
        node.close();
        done(answer);
      } else showTrouble(trouble, answer);
    });
    const chooser = ds.chooser({
      look: (page, seen) => {
        const text = counts(seen || {});
        set(found, text ? t("js.ds.folder_holds", { what: text }) : t("js.ds.folder_holds_none"));
        K5.toggle(found, "none", !text);
      },
    });
    const node = ds.dialog(ctx.root, t("js.ds.new_title"), el("p.k5-muted", {}, t("js.ds.new_text")), chooser.box, found,
      ds.labelled(t("js.ds.name"), name), trouble,
      el("div.k5-dialog-foot", {}, K5.button(t("js.ds.cancel"), () => node.close()), make));
  };

  ds.openDialog = (ctx, done) => {
    const trouble = el("div.k5-ds-problem", { role: "alert" });
    const pick = async (path) => {
      const answer = await ctx.verb("open_dataset", path);
      if (answer.id) {
        node.close();
        done(answer);
      } else showTrouble(trouble, answer);
    };
    const chooser = ds.chooser({ files: true, look: () => {}, pick });
    const node = ds.dialog(ctx.root, t("js.ds.open_title"), el("p.k5-muted", {}, t("js.ds.open_text")), chooser.box, trouble,
      el("div.k5-dialog-foot", {}, K5.button(t("js.ds.cancel"), () => node.close()), ds.primary(t("js.ds.open"), () => pick(chooser.typed()))));
  };

  // Another folder for the open dataset. `add(folder, kind)` answers what the verb answered.
  ds.folderDialog = (ctx, add) => {
    const trouble = el("div.k5-ds-problem", { role: "alert" });
    const found = el("p.k5-ds-found", { "aria-live": "polite" });
    let kind = "video";
    const choice = ds.select(t("js.ds.kind"), ["video", "image"].map((key) => [key, t("js.ds.kind." + key)]), kind, (value) => {
      kind = value;
    });
    const chooser = ds.chooser({
      look: (page, seen) => {
        const text = counts(seen || {});
        set(found, text ? t("js.ds.folder_holds", { what: text }) : t("js.ds.folder_holds_none"));
        K5.toggle(found, "none", !text);
        if (seen && (seen.images || 0) > (seen.videos || 0)) kind = "image";
        else if (seen && seen.videos) kind = "video";
        choice.value = kind;
      },
    });
    const go = ds.primary(t("js.ds.add_folder"), async () => {
      go.disabled = true;
      const answer = await add(chooser.typed(), kind);
      go.disabled = false;
      if (answer.error || answer.problems) showTrouble(trouble, answer);
      else node.close();
    });
    const node = ds.dialog(ctx.root, t("js.ds.add_folder"), chooser.box, found, ds.labelled(t("js.ds.kind"), choice), trouble,
      el("div.k5-dialog-foot", {}, K5.button(t("js.ds.cancel"), () => node.close()), go));
  };
})();
