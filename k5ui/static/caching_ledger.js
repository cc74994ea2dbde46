/* The ledger of a dataset: for each table of it a card with bars by state, reasons in words, what is left out. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const STATES = ["valid", "foreign", "stale", "broken", "missing"];

  const plural = (key, n, values = {}) => t(key + new Intl.PluralRules(K5.language).select(n), { n, ...values });
  const size = (bytes) => {
    if (bytes >= 1e9) return t("js.caching.gb", { n: (bytes / 1e9).toFixed(bytes < 1e10 ? 1 : 0) });
    if (bytes >= 1e6) return t("js.caching.mb", { n: (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0) });
    return t("js.caching.kb", { n: Math.round(bytes / 1e3) });
  };
  // Changes the children only if what they are made of changed, so that nothing that is open closes.
  const redraw = (node, value, make) => {
    const mark = JSON.stringify(value);
    if (node.dataset.drawn === mark) return;
    node.dataset.drawn = mark;
    node.replaceChildren(...make().filter(Boolean));
  };

  // One bar: segments by state, the numbers behind it, a legend of the states that occur.
  const makeBar = (name) => {
    const segments = Object.fromEntries(STATES.map((state) => [state, el("i." + state)]));
    const bar = el("div.k5-ledger-bar", { role: "img" }, Object.values(segments));
    const numbers = el("span.k5-ledger-numbers");
    const legend = el("div.k5-ledger-legend");
    const box = el("div.k5-ledger", {}, el("div.k5-ledger-head", {}, el("strong", {}, name), numbers), bar, legend);
    const update = (data) => {
      const states = data.states || {};
      for (const state of STATES) {
        const count = states[state] || 0;
        segments[state].style.flexGrow = String(count);
        segments[state].title = t("js.caching.state." + state) + ": " + count;
        K5.toggle(segments[state], "none", !count);
      }
      const text = STATES.filter((state) => states[state]).map((state) => states[state] + " " + t("js.caching.state." + state)).join(", ");
      bar.setAttribute("aria-label", name + ": " + (text || t("js.caching.nothing")));
      set(numbers, data.total ? [t("js.caching.of", { n: data.usable, total: data.total }), data.bytes ? size(data.bytes) : ""].filter(Boolean).join(" · ") : t("js.caching.nothing"));
      redraw(legend, states, () => STATES.filter((state) => states[state]).map((state) =>
        el("span", {}, el("i.k5-ledger-dot." + state), states[state] + " " + t("js.caching.state." + state))));
    };
    return { box, update };
  };

  const reasonRow = (what, reason) => el("li", {},
    el("i.k5-ledger-dot." + reason.state),
    el("div", {}, el("span", {}, what + ": " + reason.text),
      el("span.k5-small", {}, " " + reason.names.slice(0, 3).join(", ") + (reason.named > 3 ? t("js.caching.and_more", { n: reason.named - 3 }) : ""))),
    el("b", {}, String(reason.count)));

  const fold = (label, items, total, bad) => el("details.k5-fold" + (bad ? ".bad" : ""), {}, el("summary", {}, label),
    el("ul", {}, items, total > items.length ? el("li.k5-muted", {}, t("js.caching.and_more", { n: total - items.length })) : null));

  const skippedFold = (key, entry, broken, total) => (total ? fold(plural(key, total),
    entry.skipped.filter((row) => row.broken === broken).map((row) => el("li", {}, el("b", {}, row.name), " " + row.reason)), total, broken) : null);

  const makeCard = (actions) => {
    const title = el("strong");
    const mark = el("span.k5-state");
    const path = el("div.k5-small.k5-ledger-path");
    const latents = makeBar(t("js.caching.latents"));
    const texts = makeBar(t("js.caching.texts"));
    const reasons = el("ul.k5-reasons");
    const more = el("div");
    const orphans = el("div.k5-orphans");
    const bars = el("div.k5-ledger-bars", {}, latents.box, texts.box);
    const box = el("section.k5-card.k5-ledger-card", {}, el("div.k5-row", {}, title, el("span.k5-grow"), mark), path, bars, reasons, more, orphans);

    const drawMore = (entry) => [
      entry.problem ? el("p.k5-trouble.bad", {}, entry.problem) : null,
      ...(entry.problems || []).map((text) => el("p.k5-trouble.bad", {}, text)),
      skippedFold("js.caching.broken.", entry, true, entry.broken_total),
      skippedFold("js.caching.skipped.", entry, false, entry.skipped_total - entry.broken_total),
      entry.missing_captions_total ? fold(plural("js.caching.uncaptioned.", entry.missing_captions_total),
        entry.missing_captions.map((name) => el("li", {}, name)), entry.missing_captions_total) : null,
      entry.held ? el("p.k5-small", {}, plural("js.caching.held.", entry.held)) : null,
    ];
    const drawOrphans = (found) => !found || !found.count ? [] : [
      fold(plural("js.caching.orphans.", found.count, { size: size(found.bytes) }), found.names.map((name) => el("li", {}, name)), found.count),
      K5.sureButton(t("js.caching.prune"), actions.prune, { icon: "trash", title: t("js.caching.prune_title") }),
    ];
    const update = (entry) => {
      set(title, t(entry.kind === "image" ? "js.caching.images" : "js.caching.videos", { name: entry.source }));
      set(path, entry.path);
      path.title = entry.cache_directory;
      const state = !entry.enabled ? "off" : entry.problem ? "failed" : entry.ready ? "finished" : "todo";
      mark.className = "k5-state " + state;
      set(mark, t("js.caching.mark." + state));
      bars.hidden = !entry.latents;
      if (entry.latents) {
        latents.update(entry.latents);
        texts.update(entry.texts);
      }
      const rows = [entry.latents, entry.texts].map((data) => (data ? data.reasons : []));
      redraw(reasons, rows, () => rows.flatMap((list, index) =>
        list.map((reason) => reasonRow(t(index ? "js.caching.text_one" : "js.caching.latent_one"), reason))));
      redraw(more, [entry.problem, entry.problems, entry.skipped, entry.missing_captions, entry.held], () => drawMore(entry));
      redraw(orphans, entry.orphans, () => drawOrphans(entry.orphans));
    };
    return { box, update };
  };

  // All cards of a dataset; a card stays the same element while its table exists.
  K5.ledger = (actions) => {
    const box = el("div.k5-ledgers");
    const cards = new Map();
    const update = (entries) => {
      entries.forEach((entry, place) => {
        if (!cards.has(entry.index)) cards.set(entry.index, makeCard(actions));
        const card = cards.get(entry.index);
        card.update(entry);
        if (box.children[place] !== card.box) box.insertBefore(card.box, box.children[place] || null);
      });
      const wanted = new Set(entries.map((entry) => entry.index));
      for (const [index, card] of cards) {
        if (wanted.has(index)) continue;
        card.box.remove();
        cards.delete(index);
      }
    };
    const clear = () => {
      cards.clear();
      box.replaceChildren();
    };
    return { box, update, clear };
  };
  K5.caching = { plural, size, redraw };
})();
