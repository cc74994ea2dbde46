/* Curves over steps, drawn by uPlot (vendor/uplot): panes that share zoom and cursor, marks, and colours of the theme.
   Drag = zoom, Shift+drag or arrow keys = move, Ctrl+wheel or + and - = zoom, double click or 0 = all. */
(() => {
  "use strict";
  const { el } = K5;
  let groups = 0;

  const colour = (node, name) => getComputedStyle(node).getPropertyValue(name).trim();
  const AXIS = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";

  // The first index of a sorted list whose value is not below `value`.
  K5.lowerBound = (list, value) => {
    let low = 0;
    let high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  K5.nearest = (list, value) => {
    const after = K5.lowerBound(list, value);
    if (after <= 0) return 0;
    if (after >= list.length) return list.length - 1;
    return value - list[after - 1] <= list[after] - value ? after - 1 : after;
  };
  K5.count = (n) => Math.round(n).toLocaleString(K5.language);
  // About four figures, whatever the size; very small and very large ones with an exponent.
  K5.figures = (value, digits = 3) => {
    if (value === null || value === undefined || !isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 2).replace("e+", "e");
    return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4);
  };

  // The same for an axis: no zeros that say nothing.
  K5.short = (value) => {
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(1).replace("e+", "e").replace(".0e", "e") : String(Number(value.toPrecision(3)));
  };

  // A y range that holds still: it grows at once, and shrinks only when a third of it would be empty.
  const steady = () => {
    let kept = null;
    return (low, high, log) => {
      if (log) {
        low = Math.max(low, 1e-12);
        high = Math.max(high, low * 1.01);
        [low, high] = [low / 1.1, high * 1.1];
      } else {
        const room = (high - low || Math.abs(high) || 1) * 0.06;
        [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
      }
      const size = (range) => (log ? Math.log(range[1] / range[0]) : range[1] - range[0]);
      const fits = kept && kept[2] === log && low >= kept[0] && high <= kept[1] && size([low, high]) > 0.66 * size(kept);
      if (!fits) kept = [low, high, log];
      return [kept[0], kept[1]];
    };
  };

  // Panes that look at the same steps. `onView(range|null)` is told when somebody zooms, `onCursor(step|null)` of the
  // pointer; `whole()` gives [first, last] of everything.
  K5.chartGroup = ({ whole, onView, onCursor }) => {
    const sync = uPlot.sync("k5-" + (groups += 1));
    const panes = new Set();
    let view = null;
    const bounds = () => {
      const [first, last] = whole();
      return [first, Math.max(last, first + 1)];
    };
    const range = () => view || bounds();
    const setView = (from, to) => {
      const [first, last] = bounds();
      const span = Math.min(Math.max(to - from, 4), last - first);
      const start = Math.min(Math.max(from, first), last - span);
      view = span >= last - first ? null : [start, start + span];
      for (const pane of panes) pane.look();
      onView(view);
    };
    const zoom = (factor, centre) => {
      const [from, to] = range();
      const at = centre === undefined ? (from + to) / 2 : centre;
      setView(at - (at - from) * factor, at + (to - at) * factor);
    };
    const move = (share) => {
      const [from, to] = range();
      setView(from + share * (to - from), to + share * (to - from));
    };
    const reset = () => setView(...bounds());
    const forget = () => {
      view = null;
    };
    return { sync, panes, range, setView, zoom, move, reset, forget, onCursor, zoomed: () => view !== null };
  };

  const drag = (plot, group, box) => {
    // Before uPlot sees it: with Shift the press moves the view instead of marking a part of it.
    let from = null;
    box.addEventListener("mousedown", (event) => {
      if (!event.shiftKey && event.button !== 1) return;
      event.preventDefault();
      event.stopPropagation();
      from = { x: event.clientX, range: group.range() };
    }, true);
    const moved = (event) => {
      if (!from) return;
      const [a, b] = from.range;
      const shift = ((from.x - event.clientX) / plot().over.clientWidth) * (b - a);
      group.setView(a + shift, b + shift);
    };
    const up = () => {
      from = null;
    };
    addEventListener("mousemove", moved);
    addEventListener("mouseup", up);
    box.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const over = plot().over.getBoundingClientRect();
      group.zoom(event.deltaY > 0 ? 1.25 : 0.8, plot().posToVal(event.clientX - over.left, "x"));
    }, { passive: false });
    box.addEventListener("keydown", (event) => {
      const act = { ArrowLeft: () => group.move(-0.2), ArrowRight: () => group.move(0.2), "+": () => group.zoom(0.5), "=": () => group.zoom(0.5), "-": () => group.zoom(2), 0: () => group.reset() }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
    // A finger shows values; the page still scrolls up and down.
    box.addEventListener("touchmove", (event) => {
      const over = plot().over.getBoundingClientRect();
      plot().setCursor({ left: event.touches[0].clientX - over.left, top: event.touches[0].clientY - over.top });
    }, { passive: true });
    return () => {
      removeEventListener("mousemove", moved);
      removeEventListener("mouseup", up);
    };
  };

  // One pane. `lines`: {label, colour (CSS variable), width, dash, points, alpha}; `format(value)` writes its y axis;
  // `limits()` may give [low, high] of what must be seen; `marks()` lists [step, kind]; `log()` whether y is logarithmic.
  K5.chartPane = (group, { label, height, lines, format, limits, marks, log = () => false, ticks = 4 }) => {
    const box = el("div.k5-pane", { tabindex: "0", role: "img", "aria-label": label, style: "height:" + height + "px" });
    const hold = steady();
    let plot = null;
    let data = null;
    let shown = lines;
    let unbind = null;
    let wasLog = null;
    const axis = { font: AXIS, stroke: () => colour(box, "--k5-muted"), grid: { stroke: () => colour(box, "--k5-line"), width: 1 }, ticks: { show: false } };
    const series = (line) => ({
      label: line.label, width: line.width || 1, dash: line.dash, spanGaps: true, alpha: line.alpha || 1,
      stroke: () => colour(box, line.colour), fill: undefined,
      points: { show: Boolean(line.points), size: 5, fill: () => colour(box, line.colour) },
    });
    const yRange = (u, low, high) => {
      const wanted = limits ? limits() : null;
      const [from, to] = wanted || [low, high];
      return from === null || from === undefined || !isFinite(from) || !isFinite(to) ? [log() ? 0.01 : 0, 1] : hold(from, to, log());
    };
    const drawMarks = (u) => {
      if (!marks) return;
      const context = u.ctx;
      const { left, top, width, height: tall } = u.bbox;
      const ratio = devicePixelRatio || 1;
      context.save();
      context.beginPath();
      context.rect(left - 8 * ratio, top, width + 16 * ratio, tall);
      context.clip();
      for (const [step, kind] of marks()) {
        const x = Math.round(u.valToPos(step, "x", true));
        if (x < left - 8 || x > left + width + 8) continue;
        const bottom = top + tall;
        context.fillStyle = context.strokeStyle = colour(box, kind === "resume" ? "--k5-warn" : kind === "sample" ? "--k5-mark" : "--k5-ok");
        context.lineWidth = ratio;
        context.beginPath();
        if (kind === "resume") {
          context.setLineDash([3 * ratio, 3 * ratio]);
          context.moveTo(x, top);
          context.lineTo(x, bottom);
          context.stroke();
          context.setLineDash([]);
        } else if (kind === "sample") {
          context.moveTo(x - 4 * ratio, bottom);
          context.lineTo(x + 4 * ratio, bottom);
          context.lineTo(x, bottom - 7 * ratio);
          context.fill();
        } else {
          context.rect(x - 3 * ratio, bottom - 16 * ratio, 6 * ratio, 6 * ratio);
          if (kind === "state") context.stroke();
          else context.fill();
        }
      }
      context.restore();
    };
    const make = () => {
      if (unbind) unbind();
      if (plot) plot.destroy();
      wasLog = log();
      plot = new uPlot({
        width: Math.max(120, box.clientWidth), height, legend: { show: false }, padding: [8, 16, 0, 0],
        cursor: {
          sync: { key: group.sync.key, scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } }, drag: { x: true, y: false, setScale: false, dist: 6 }, points: { size: 5 },
          bind: { dblclick: () => () => (group.reset(), null) }, y: false,
        },
        scales: { x: { time: false, range: () => group.range() }, y: { distr: wasLog ? 3 : 1, range: yRange } },
        axes: [
          { ...axis, size: 22, gap: 2, space: 64, values: (u, values) => values.map((value) => (value === Math.round(value) ? K5.count(value) : "")) },
          { ...axis, size: 54, gap: 4, space: Math.max(16, height / (ticks + 3)), values: (u, values) => values.map((value) => (value === null ? "" : format(value))) },
        ],
        series: [{}, ...shown.map(series)],
        hooks: {
          setSelect: [(u) => {
            const { left, width } = u.select;
            if (width < 6) return;
            const from = u.posToVal(left, "x");
            const to = u.posToVal(left + width, "x");
            u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
            group.setView(from, to);
          }],
          setCursor: [(u) => group.onCursor(u.cursor.left >= 0 ? u.posToVal(u.cursor.left, "x") : null)],
          draw: [drawMarks],
        },
      }, data || [[], ...shown.map(() => [])], box);
      group.sync.sub(plot);
      unbind = drag(() => plot, group, box);
    };
    const pane = {
      box,
      // `lines` are given anew when there are others (an overlay more or less).
      set: (table, others) => {
        data = table;
        const changed = others && JSON.stringify(others) !== JSON.stringify(shown);
        if (others) shown = others;
        if (!box.clientWidth) return;
        if (!plot || changed || wasLog !== log()) make();
        else plot.setData(table, true);
      },
      look: () => plot && plot.setData(data, true),
      redraw: () => plot && plot.redraw(false, true),
    };
    new ResizeObserver(() => {
      if (!box.clientWidth || !data) return;
      if (!plot) make();
      else if (Math.abs(plot.width - box.clientWidth) > 1) plot.setSize({ width: box.clientWidth, height });
    }).observe(box);
    new MutationObserver(() => pane.redraw()).observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });
    group.panes.add(pane);
    return pane;
  };
})();
