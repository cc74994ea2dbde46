/* A grid of items that draws only what is on screen: 10,000 items are as light as 20. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;
  const BLOCK = 100; // items asked for at once
  const GAP = 8;
  const TEXT = 44; // pixels of a tile below its picture

  ds.clipCount = (item) => (item.clip_count === undefined ? item.clips.length : item.clip_count);
  ds.facts = (item) => [
    item.width ? item.width + "×" + item.height : "",
    item.kind === "video" && item.fps ? t("js.ds.fps_n", { n: Number(item.fps.toFixed(2)) }) + (item.variable_rate ? " " + t("js.ds.variable") : "") : "",
    item.kind === "video" && item.seconds ? K5.seconds(item.seconds) : "",
  ].filter(Boolean).join(" · ");
  ds.worst = (findings) => ["error", "warning", "info"].find((severity) => findings.some((finding) => finding.severity === severity));
  ds.picture = (item) => {
    if (!item.thumb) return ds.icon(item.kind === "video" ? "film" : "image");
    return el("img", { src: K5.url(item.thumb), alt: "", decoding: "async", onerror: (event) => event.target.replaceWith(ds.icon("warn", t("js.ds.no_picture"))) });
  };
  // A muted clip laid over a thumbnail once it can be seen; `stop` takes it away.
  ds.playOver = (place, item) => {
    if (!item || !item.preview) return () => {};
    const video = el("video", { src: K5.url(item.preview), loop: true, autoplay: true, playsInline: true, "aria-hidden": "true" });
    video.muted = true;
    video.addEventListener("playing", () => video.classList.add("on"), { once: true });
    place.append(video);
    video.play().catch(() => {});
    return () => {
      video.pause();
      video.removeAttribute("src");
      video.load();
      video.remove();
    };
  };

  // --- one tile --------------------------------------------------------------------------------------------------
  const makeTile = (index) => {
    const thumb = el("div.k5-ds-thumb");
    const mark = el("span.k5-ds-check", { "aria-hidden": "true" }, K5.icon("tick"));
    const badges = el("span.k5-ds-badges");
    const clips = el("span.k5-ds-badge.k5-ds-clip-count", { hidden: true });
    const name = el("span.k5-ds-tile-name");
    const facts = el("span.k5-small.k5-ds-tile-facts");
    const node = el("div.k5-ds-tile", { role: "option", id: "k5-ds-tile-" + index }, thumb, mark, badges, clips, name, facts);
    node.dataset.index = index;
    return { node, thumb, badges, clips, name, facts, index, key: null, drawn: "", picture: "", stop: null };
  };
  const badge = (kind, text, title) => el("span.k5-ds-badge." + kind, { title }, text);
  const fillTile = (tile, item) => {
    const drawn = item ? JSON.stringify([item.key, item.name, item.reason, item.excluded, item.caption === null, item.findings, ds.clipCount(item), item.width]) : "";
    if (tile.drawn === drawn && tile.key === (item && item.key)) return;
    tile.drawn = drawn;
    tile.key = item ? item.key : null;
    set(tile.name, item ? item.name : "");
    set(tile.facts, item ? ds.facts(item) : "");
    K5.toggle(tile.node, "waiting", !item);
    K5.toggle(tile.node, "excluded", item && item.excluded);
    tile.clips.hidden = !item || item.kind !== "video" || ds.clipCount(item) < 2;
    if (!item) {
      tile.badges.replaceChildren();
      return;
    }
    set(tile.clips, ds.many("clips", ds.clipCount(item)));
    tile.node.title = item.name;
    const worst = ds.worst(item.findings);
    tile.badges.replaceChildren(...[
      item.excluded ? badge("off", t("js.ds.excluded")) : null,
      item.reason && !item.excluded ? badge("warn", t("js.ds.skipped"), item.reason) : null,
      item.caption === null && !item.reason && !item.excluded ? badge("warn", t("js.ds.no_caption")) : null,
      worst ? badge(worst === "info" ? "info" : worst === "error" ? "bad" : "warn", String(item.findings.length), item.findings.map((finding) => t("js.ds.kind_name." + finding.kind)).join(", ")) : null,
    ].filter(Boolean));
    const told = [item.name, ds.facts(item), item.excluded ? t("js.ds.excluded") : "", item.reason || ""].filter(Boolean).join(", ");
    tile.node.setAttribute("aria-label", told);
  };
  const fillPicture = (tile, item) => {
    const wanted = item ? item.thumb || "none:" + item.kind : "";
    if (tile.picture === wanted) return;
    tile.picture = wanted;
    tile.thumb.replaceChildren(...(item ? [ds.picture(item)] : []));
  };

  // --- the grid --------------------------------------------------------------------------------------------------
  // `ask(offset, limit)` answers {total, items}; `chosen(item, index)` is told what is current; `picked(map)` what is selected.
  ds.grid = ({ ask, chosen, picked, counted }) => {
    const canvas = el("div.k5-ds-canvas");
    const nothing = el("div.k5-empty", { hidden: true }, K5.icon("search"), el("strong", {}, t("js.ds.none_found")));
    const box = el("div.k5-ds-grid", { tabIndex: 0, role: "listbox", "aria-multiselectable": "true", "aria-label": t("js.ds.view.items") }, canvas, nothing);
    const tiles = new Map();
    let blocks = new Map();
    let asked = new Map();
    let total = null;
    let columns = 4;
    let rowHeight = 180;
    let tileWidth = 180;
    let current = -1;
    let anchor = -1;
    let generation = 0;
    let playing = null;
    const selected = new Map();

    const item = (index) => (blocks.get(Math.floor(index / BLOCK)) || [])[index % BLOCK];
    const load = (block) => {
      const turn = generation;
      if (asked.get(block) === turn) return Promise.resolve();
      asked.set(block, turn);
      return ask(block * BLOCK, BLOCK).then((page) => {
        if (turn !== generation) return;
        blocks.set(block, page.items);
        const grown = total !== page.total;
        total = page.total;
        if (current >= total) current = anchor = total - 1;
        counted(total);
        nothing.hidden = total > 0;
        for (const one of page.items) if (selected.has(one.key)) selected.set(one.key, one);
        if (grown) measure();
        else draw();
        if (current < 0 && total > 0 && item(0)) move(0, { quiet: true });
        else if (current >= 0 && Math.floor(current / BLOCK) === block) chosen(item(current), current);
      }).catch(() => asked.delete(block));
    };
    const measure = () => {
      const width = box.clientWidth;
      if (!width) return;
      const least = width < 480 ? 132 : 168;
      columns = Math.max(2, Math.floor((width - GAP) / (least + GAP)));
      tileWidth = (width - GAP * (columns + 1)) / columns;
      rowHeight = Math.round(tileWidth * 0.7) + TEXT + GAP;
      canvas.style.height = Math.ceil((total || 0) / columns) * rowHeight + GAP + "px";
      draw();
    };
    const place = (tile) => {
      const left = GAP + (tile.index % columns) * (tileWidth + GAP);
      const top = GAP + Math.floor(tile.index / columns) * rowHeight;
      const at = "transform:translate(" + left.toFixed(1) + "px," + top + "px);width:" + tileWidth.toFixed(1) + "px;height:" + (rowHeight - GAP) + "px";
      if (tile.at !== at) tile.node.style.cssText = tile.at = at;
    };
    const range = () => {
      const first = Math.max(0, Math.floor(box.scrollTop / rowHeight) - 1) * columns;
      return [first, Math.min(total || 0, (Math.ceil((box.scrollTop + box.clientHeight) / rowHeight) + 1) * columns)];
    };
    const draw = () => {
      if (total === null) return;
      const [first, last] = range();
      for (const [index, tile] of tiles) {
        if (index < first || index >= last) {
          if (playing && playing.tile === tile) stopPlaying();
          tile.node.remove();
          tiles.delete(index);
        }
      }
      for (let index = first; index < last; index += 1) {
        let tile = tiles.get(index);
        if (!tile) {
          tile = makeTile(index);
          tiles.set(index, tile);
          canvas.append(tile.node);
        }
        const one = item(index);
        place(tile);
        fillTile(tile, one);
        if (tile.picture && (!one || tile.picture !== (one.thumb || "none:" + one.kind))) fillPicture(tile, null);
        const on = Boolean(one && selected.has(one.key));
        K5.toggle(tile.node, "on", on);
        K5.toggle(tile.node, "current", index === current);
        tile.node.setAttribute("aria-selected", String(on));
        tile.node.setAttribute("aria-posinset", String(index + 1));
        tile.node.setAttribute("aria-setsize", String(total));
      }
      if (current >= 0 && tiles.has(current)) box.setAttribute("aria-activedescendant", "k5-ds-tile-" + current);
      else box.removeAttribute("aria-activedescendant");
      settle();
    };
    // Pictures and blocks are asked for when the scrolling rests, so that a long drag asks for nothing on its way.
    const settle = ds.debounce(() => {
      if (!box.isConnected) return;
      const [first, last] = range();
      for (let block = Math.floor(first / BLOCK); block <= Math.floor(Math.max(first, last - 1) / BLOCK); block += 1) load(block);
      for (const [index, tile] of tiles) fillPicture(tile, item(index));
    }, 70);

    const stopPlaying = () => {
      if (playing) playing.stop();
      playing = null;
    };
    const play = (index) => {
      const tile = tiles.get(index);
      if (!tile || (playing && playing.tile === tile)) return;
      stopPlaying();
      playing = { tile, stop: ds.playOver(tile.thumb, item(index)) };
    };
    const tell = () => {
      draw();
      picked(selected);
    };
    const selectOnly = (index) => {
      selected.clear();
      const one = item(index);
      if (one) selected.set(one.key, one);
    };
    const selectRange = async (from, to) => {
      const [first, last] = from < to ? [from, to] : [to, from];
      const wanted = [];
      for (let block = Math.floor(first / BLOCK); block <= Math.floor(last / BLOCK); block += 1) if (!blocks.has(block)) wanted.push(load(block));
      await Promise.all(wanted);
      selected.clear();
      for (let index = first; index <= last; index += 1) if (item(index)) selected.set(item(index).key, item(index));
      tell();
    };
    const reveal = (index) => {
      const top = GAP + Math.floor(index / columns) * rowHeight;
      if (top < box.scrollTop) box.scrollTop = top - GAP;
      else if (top + rowHeight > box.scrollTop + box.clientHeight) box.scrollTop = top + rowHeight - box.clientHeight;
    };
    const move = (index, { extend = false, quiet = false } = {}) => {
      if (!total) return;
      current = Math.max(0, Math.min(total - 1, index));
      if (extend) selectRange(anchor < 0 ? current : anchor, current);
      else {
        anchor = current;
        if (!quiet) {
          selectOnly(current);
          picked(selected);
        }
      }
      if (!quiet) reveal(current);
      draw();
      if (item(current)) chosen(item(current), current);
      else load(Math.floor(current / BLOCK));
    };
    const flip = (index) => {
      const one = item(index);
      if (!one) return;
      if (selected.has(one.key)) selected.delete(one.key);
      else selected.set(one.key, one);
      anchor = current = index;
      chosen(one, index);
      tell();
    };

    canvas.addEventListener("click", (event) => {
      const node = event.target.closest(".k5-ds-tile");
      if (!node) return;
      const index = Number(node.dataset.index);
      if (event.target.closest(".k5-ds-check") || event.ctrlKey || event.metaKey) flip(index);
      else move(index, { extend: event.shiftKey });
    });
    canvas.addEventListener("mousedown", (event) => event.shiftKey && event.preventDefault());
    canvas.addEventListener("pointerover", (event) => {
      const node = event.target.closest(".k5-ds-tile");
      if (node && event.pointerType === "mouse") play(Number(node.dataset.index));
    });
    canvas.addEventListener("pointerleave", stopPlaying);
    box.addEventListener("scroll", draw, { passive: true });
    box.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(box.clientHeight / rowHeight)) * columns;
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page };
      if (event.key in steps) move(current + steps[event.key], { extend: event.shiftKey });
      else if (event.key === "Home") move(0, { extend: event.shiftKey });
      else if (event.key === "End") move(total - 1, { extend: event.shiftKey });
      else if (event.key === " ") {
        if (event.shiftKey || event.ctrlKey) flip(current);
        else if (playing && playing.tile === tiles.get(current)) stopPlaying();
        else play(current);
      } else if (event.key.toLowerCase() === "a" && (event.ctrlKey || event.metaKey)) selectRange(0, total - 1);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    new ResizeObserver(measure).observe(box);

    return {
      box,
      item,
      current: () => current,
      total: () => total,
      selected,
      move,
      measure,
      stop: stopPlaying,
      clear: () => {
        selected.clear();
        tell();
      },
      all: () => selectRange(0, total - 1),
      // Ask again; what is drawn stays until the answer is there, and the place in the list is kept unless `top`.
      reload: (top) => {
        generation += 1;
        asked = new Map();
        if (top) {
          blocks = new Map();
          current = anchor = -1;
          selected.clear();
          picked(selected);
          box.scrollTop = 0;
        }
        if (total === null || top) return load(0);
        settle();
        return Promise.resolve();
      },
    };
  };
})();
