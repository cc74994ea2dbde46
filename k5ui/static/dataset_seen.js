/* What the model sees: crop, frames and clip of one item as they are trained; and the buckets with their batches. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;
  const STRIP = 60; // items in the row of choices at a time
  const CLIPS = 40; // clips of one item that get a button

  ds.bucketName = (bucket, kind) => bucket.width + "×" + bucket.height + (kind === "image" || bucket.frames === 1 ? "" : " · " + ds.many("frames", bucket.frames));
  ds.bucketKey = (bucket) => [bucket.width, bucket.height, bucket.frames].join("x");
  const inBucket = (item, key) => (item.clips || []).some((clip) => ds.bucketKey(clip) === key);
  const allBuckets = (detail) => {
    const found = new Map();
    for (const entry of detail.entries) {
      if (!entry.enabled) continue;
      for (const bucket of entry.buckets || []) {
        const key = ds.bucketKey(bucket);
        const one = found.get(key) || { ...bucket, items: 0, kind: entry.kind };
        one.items += bucket.items;
        found.set(key, one);
      }
    }
    return [...found.values()].sort((a, b) => b.items - a.items);
  };

  // --- the row of items to choose from ---------------------------------------------------------------------------
  const makeRow = (ctx, choose) => {
    const box = el("div.k5-ds-row", { role: "listbox", "aria-label": t("js.ds.view.items"), tabIndex: 0 });
    let items = [];
    let offset = 0;
    let total = 0;
    let bucket = "";
    let busy = false;
    let turn = 0;
    const buttons = new Map();
    const more = async () => {
      if (busy || offset >= total) return;
      busy = true;
      const asked = turn;
      try {
        const values = new URLSearchParams({ offset, limit: STRIP, only: "all" });
        if (bucket) values.set("bucket", bucket);
        const page = await K5.get(ctx.path("/items?" + values));
        if (asked !== turn) return;
        total = page.total;
        offset += page.items.length || STRIP;
        for (const item of page.items) {
          if (!item.clips.length || item.excluded || (bucket && !inBucket(item, bucket))) continue;
          const button = el("button.k5-ds-pick", { type: "button", role: "option", tabIndex: -1, title: item.name, onclick: () => choose(item) }, ds.picture(item), el("span", {}, item.name));
          buttons.set(item.key, button);
          items.push(item);
          box.append(button);
        }
      } catch (error) {
        offset = total; // the header says that the server is away
      } finally {
        busy = false;
      }
      if (asked === turn && box.scrollWidth <= box.clientWidth + 200 && offset < total) await more();
    };
    box.addEventListener("scroll", () => box.scrollLeft + box.clientWidth > box.scrollWidth - 300 && more(), { passive: true });
    const mark = (key, scroll) => {
      for (const [one, button] of buttons) {
        K5.toggle(button, "on", one === key);
        button.setAttribute("aria-selected", String(one === key));
      }
      const button = buttons.get(key);
      if (button && scroll) box.scrollLeft = button.offsetLeft - (box.clientWidth - button.offsetWidth) / 2;
    };
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !items.length) return;
      event.preventDefault();
      const at = items.findIndex((item) => buttons.get(item.key).classList.contains("on"));
      choose(items[Math.max(0, Math.min(items.length - 1, at + step))], true);
    });
    const open = async (wanted) => {
      turn += 1;
      busy = false;
      bucket = wanted;
      items = [];
      offset = 0;
      total = 1;
      buttons.clear();
      box.replaceChildren();
      await more();
      return items;
    };
    return { box, open, mark };
  };

  // --- one item as it is trained ---------------------------------------------------------------------------------
  const figure = (title, ...content) => el("figure.k5-ds-figure", {}, el("figcaption.k5-label", {}, title), ...content);
  const cropBox = (item, seen) => {
    const [width, height] = seen.scaled;
    const [left, top, right, bottom] = seen.crop;
    const percent = (value, whole) => ((100 * value) / whole).toFixed(3) + "%";
    const frame = el("div.k5-ds-crop", { style: "left:" + percent(left, width) + ";top:" + percent(top, height) + ";width:" + percent(right - left, width) + ";height:" + percent(bottom - top, height) });
    const box = el("div.k5-ds-whole", { style: "aspect-ratio:" + seen.source[0] + "/" + seen.source[1] + ";--k5-ratio:" + seen.source[0] / seen.source[1] }, ds.picture(item), frame);
    box.setAttribute("aria-label", t("js.ds.crop_label"));
    return box;
  };
  const sizeWords = (seen) => {
    const [sourceW, sourceH] = seen.source;
    const [scaledW, scaledH] = seen.scaled;
    const [bucketW, bucketH] = seen.bucket;
    const said = [];
    if (sourceW !== scaledW || sourceH !== scaledH) said.push(t(scaledW > sourceW ? "js.ds.enlarged" : "js.ds.scaled", { a: sourceW + "×" + sourceH, b: scaledW + "×" + scaledH }));
    else said.push(t("js.ds.own_size", { a: sourceW + "×" + sourceH }));
    const lostW = (100 * (scaledW - bucketW)) / scaledW;
    const lostH = (100 * (scaledH - bucketH)) / scaledH;
    if (lostW < 0.05 && lostH < 0.05) said.push(t("js.ds.nothing_cut"));
    if (lostW >= 0.05) said.push(t("js.ds.cut_sides", { n: lostW.toFixed(1) }));
    if (lostH >= 0.05) said.push(t("js.ds.cut_top", { n: lostH.toFixed(1) }));
    return said.join(" ");
  };
  const frameWords = (item, seen) => {
    if (item.kind === "image") return t("js.ds.one_picture");
    const used = seen.source_numbers || [];
    if (!used.length) return ds.many("frames", seen.frames);
    const last = used[used.length - 1];
    const words = [t("js.ds.frames_used", { what: ds.many("frames", seen.frames), a: used[0], b: last })];
    const seconds = seen.seconds || [];
    if (seconds.length) words.push(t("js.ds.seconds_used", { a: seconds[0].toFixed(2), b: seconds[seconds.length - 1].toFixed(2) }));
    const steps = used.slice(1).map((number, index) => number - used[index]);
    if (steps.some((step) => step > 1)) words.push(t("js.ds.frames_dropped", { n: Number((item.fps || 0).toFixed(2)) }));
    if (steps.some((step) => step === 0)) words.push(t("js.ds.frames_repeated", { n: Number((item.fps || 0).toFixed(2)) }));
    return words.join(" ");
  };

  ds.views.seen = (ctx) => {
    const select = ds.select(t("js.ds.bucket"), [["", t("js.ds.all_sizes")]], "", (value) => reopen(value));
    const row = makeRow(ctx, (item, scroll) => choose(item, 0, scroll));
    const stage = el("div.k5-ds-seen-stage", { "aria-live": "polite" });
    const none = el("div.k5-empty", { hidden: true }, K5.icon("eye"), el("strong", {}, t("js.ds.seen_none")), el("p", {}, t("js.ds.seen_none_text")), K5.button(t("js.ds.view.setup"), () => ctx.open("setup")));
    const box = el("div.k5-ds-seen", {}, el("p.k5-muted", {}, t("js.ds.seen_text")), el("div.k5-ds-bar", {}, select), row.box, none, stage);
    let id = null;
    let mark = "";
    let turn = 0;
    let player = null;
    let shown = "";

    const draw = (item, clip, seen) => {
      const entry = ctx.detail().entries[item.entry] || { values: {} };
      const ratio = "aspect-ratio:" + seen.bucket[0] + "/" + seen.bucket[1] + ";--k5-ratio:" + seen.bucket[0] / seen.bucket[1];
      player = seen.video ? K5.player({ url: seen.video, fps: 24, frames: seen.frames, width: seen.bucket[0], height: seen.bucket[1], prompt: item.name }) : null;
      const strip = el("img.k5-ds-strip", { src: K5.url(seen.strip), alt: t("js.ds.strip_label") });
      const trained = player ? [el("div.k5-ds-trained", { style: ratio }, player.screen), player.bar] : [el("div.k5-ds-trained", { style: ratio }, el("img", { src: K5.url(seen.strip), alt: t("js.ds.strip_label") }))];
      const clips = item.clips.length > 1 ? el("div.k5-tools.k5-ds-clips", { role: "group", "aria-label": t("js.ds.clips") }, item.clips.slice(0, CLIPS).map((one, index) =>
        el("button.k5-chip" + (index === clip ? ".on" : ""), { type: "button", "aria-pressed": String(index === clip), onclick: () => choose(item, index) },
          t("js.ds.clip_n", { n: index + 1, a: one.start, f: one.frames }))), ds.clipCount(item) > CLIPS ? el("span.k5-small", {}, t("js.ds.and_more", { n: ds.clipCount(item) - CLIPS })) : null) : null;
      const bucket = allBuckets(ctx.detail()).find((one) => one.width === seen.bucket[0] && one.height === seen.bucket[1] && one.frames === (item.kind === "image" ? 1 : seen.frames));
      const caption = (entry.values.caption_prefix || "") + (item.caption || "");
      const rows = [
        ["bucket", seen.bucket[0] + "×" + seen.bucket[1] + (item.kind === "image" ? "" : ", " + ds.many("frames", seen.frames)) + (bucket ? t("js.ds.bucket_with", { what: ds.many("items", bucket.items) }) : "")],
        ["size", sizeWords(seen)], ["frames", frameWords(item, seen)],
        ["caption", caption || t("js.ds.no_caption")],
      ];
      stage.replaceChildren(...[
        el("div.k5-row", {}, el("strong.k5-ds-chosen-name", {}, item.name), el("span.k5-grow"), K5.button(t("js.ds.to_item"), () => ctx.open("items", { text: item.name }), { kind: "plain" })),
        clips,
        el("div.k5-ds-pair", {}, figure(t("js.ds.source"), cropBox(item, seen)), figure(t("js.ds.trained"), ...trained)),
        player ? figure(t("js.ds.strip"), strip) : null,
        el("dl.k5-dl.k5-ds-words", {}, rows.flatMap(([key, text]) => [el("dt", {}, t("js.ds.word." + key)), el("dd", {}, text)])),
      ].filter(Boolean));
    };
    const choose = async (item, clip = 0, scroll = false) => {
      const asked = (turn += 1);
      ctx.setCurrent(item);
      row.mark(item.key, scroll);
      K5.toggle(stage, "waiting", true);
      try {
        const seen = await K5.get(ctx.path("/seen/" + item.key + "?clip=" + clip));
        if (asked !== turn) return;
        const now = JSON.stringify([item.key, item.caption, clip, seen]);
        if (now !== shown) draw(item, clip, seen);
        shown = now;
      } catch (error) {
        if (asked !== turn) return;
        shown = "";
        stage.replaceChildren(el("p.k5-trouble", {}, t("js.ds.seen_failed")));
      }
      K5.toggle(stage, "waiting", false);
    };
    const reopen = async (bucket) => {
      select.value = bucket;
      const items = await row.open(bucket);
      const wanted = ctx.current && items.find((item) => item.key === ctx.current.key);
      const other = ctx.current && !bucket && ctx.current.clips.length ? ctx.current : items[0];
      none.hidden = Boolean(wanted || other);
      stage.hidden = !none.hidden;
      if (wanted || other) {
        const item = wanted || other;
        choose(item, bucket ? Math.max(0, item.clips.findIndex((clip) => ds.bucketKey(clip) === bucket)) : 0, true);
      }
    };
    const update = (detail, opened) => {
      if (!detail.scanned) return; // the first look goes on; the head says how far
      const buckets = allBuckets(detail);
      const now = JSON.stringify([detail.revision, buckets]);
      if (id !== detail.id || now !== mark) {
        select.replaceChildren(el("option", { value: "" }, t("js.ds.all_sizes")),
          ...buckets.map((bucket) => el("option", { value: ds.bucketKey(bucket) }, ds.bucketName(bucket, bucket.kind) + " (" + ds.number(bucket.items) + ")")));
      } else if (!opened) return;
      const wanted = opened && ctx.seek ? ctx.seek.bucket || "" : id === detail.id ? select.value : "";
      ctx.seek = null;
      id = detail.id;
      mark = now;
      reopen(buckets.some((bucket) => ds.bucketKey(bucket) === wanted) ? wanted : "");
    };
    K5.on("space", () => K5.shown(box) && player && player.toggle());
    return { box, update };
  };

  // --- buckets ---------------------------------------------------------------------------------------------------
  const shape = (bucket) => {
    const scale = 28 / Math.max(bucket.width, bucket.height);
    return el("span.k5-ds-shape", { "aria-hidden": "true" }, el("i", { style: "width:" + Math.round(bucket.width * scale) + "px;height:" + Math.round(bucket.height * scale) + "px" }));
  };
  const bucketRow = (ctx, entry, bucket, most) => {
    const shown = bucket.items * (bucket.repeats || 1);
    const batch = bucket.batch_size || 1;
    const partial = shown % batch;
    const bar = el("span.k5-ds-bucket-bar", {}, el("i", { style: "width:" + Math.max(0.5, (100 * shown) / most) + "%" }));
    return el("button.k5-ds-bucket", { type: "button", title: t("js.ds.bucket_open"), onclick: () => ctx.open("seen", { bucket: ds.bucketKey(bucket) }) },
      shape(bucket), el("span.k5-ds-bucket-name", {}, ds.bucketName(bucket, entry.kind)), bar,
      el("span.k5-ds-bucket-text", {}, ds.many("items", bucket.items) + (bucket.repeats > 1 ? " × " + bucket.repeats : ""), el("span.k5-small", {}, ds.many("batches", bucket.batches) + (partial && batch > 1 ? ", " + t("js.ds.partial", { n: partial, of: batch }) : ""))));
  };
  ds.views.buckets = (ctx) => {
    const total = el("div.k5-ds-total-steps");
    const list = el("div.k5-ds-entries");
    const none = el("div.k5-empty", { hidden: true }, K5.icon("film"), el("strong", {}, t("js.ds.seen_none")), el("p", {}, t("js.ds.seen_none_text")), K5.button(t("js.ds.view.setup"), () => ctx.open("setup")));
    const box = el("div.k5-ds-buckets", {}, el("p.k5-muted", {}, t("js.ds.buckets_text")), total, none, list);
    let mark = "";
    const update = (detail) => {
      const now = JSON.stringify([detail.id, detail.steps_per_epoch, detail.entries.map((entry) => [entry.enabled, entry.buckets, entry.skipped_list, entry.steps_per_epoch])]);
      if (now === mark) return;
      mark = now;
      const used = detail.entries.filter((entry) => entry.enabled);
      const any = used.some((entry) => (entry.buckets || []).length);
      none.hidden = any || Boolean(detail.scanning);
      set(total, any ? t("js.ds.steps_total", { steps: ds.number(detail.steps_per_epoch || 0), what: ds.many("items", detail.items || 0) }) : "");
      const most = Math.max(1, ...used.flatMap((entry) => (entry.buckets || []).map((bucket) => bucket.items * (bucket.repeats || 1))));
      list.replaceChildren(...used.map((entry) => {
        const skipped = entry.skipped_list || [];
        return el("section.k5-ds-entry", {},
          el("div.k5-ds-entry-head", {}, ds.icon(entry.kind === "video" ? "film" : "image", t("js.ds.kind." + entry.kind)), el("div.k5-ds-name-text", {}, el("span.k5-ds-source", {}, entry.source),
            el("span.k5-small", {}, [entry.steps_per_epoch ? t("js.ds.steps", { n: ds.number(entry.steps_per_epoch) }) : "", entry.skipped ? t("js.ds.skipped_n", { n: ds.number(entry.skipped) }) : ""].filter(Boolean).join(" · ")))),
          el("div.k5-ds-bucket-list", {}, [...(entry.buckets || [])].sort((a, b) => b.items - a.items).map((bucket) => bucketRow(ctx, entry, bucket, most))),
          skipped.length ? el("details", {}, el("summary", {}, t("js.ds.skipped_n", { n: ds.number(entry.skipped || skipped.length) })),
            el("ul.k5-ds-skipped", {}, skipped.map((one) => el("li", {}, el("b", {}, one.name), " – ", one.reason)), entry.skipped > skipped.length ? el("li", {}, t("js.ds.and_more", { n: ds.number(entry.skipped - skipped.length) })) : null),
            K5.button(t("js.ds.show_skipped"), () => ctx.open("items", { only: "skipped" }), { kind: "plain" })) : null);
      }));
    };
    return { box, update };
  };
})();
