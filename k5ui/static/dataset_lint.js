/* The check of a dataset: a job with progress, and its findings by kind, each with exclude, fix, ignore and a way there. */
(() => {
  "use strict";
  const { el, set, t } = K5;
  const ds = K5.ds;
  const SHOWN = 12; // findings of a kind that are drawn at first, and with each "more"
  const FEW = 24; // so many findings are all laid open
  const PICTURES = 6; // thumbnails of one finding

  const ORDER = { error: 0, warning: 1, info: 2 };
  const FIXES = ["set_source_fps_auto", "add_prefix", "edit_caption"];
  const PAIRS = ["near_duplicate"]; // one of the items may stay

  const makeFinding = (ctx, actions, done) => (finding) => {
    const keys = finding.keys || [];
    const names = finding.identities || [];
    const pictures = keys.slice(0, PICTURES).map((key, index) => el("button.k5-ds-finding-picture", {
      type: "button", title: names[index], "aria-label": t("js.ds.go_to", { name: names[index] || "" }), onclick: () => ctx.open("items", { text: names[index] }),
    }, actions.broken(key) ? ds.icon("warn") : ds.picture({ thumb: "api/" + ctx.path("/thumb/" + key) }), el("span", {}, names[index])));
    const rest = names.length - pictures.length;
    const fixes = (finding.fixes || []).filter((fix) => FIXES.includes(fix)).map((fix) => K5.button(t("js.ds.fix." + fix), () => actions.fix(finding, fix)));
    const others = PAIRS.includes(finding.kind) && keys.length > 1;
    const out = (finding.fixes || []).includes("exclude") && keys.length
      ? K5.button(t(others ? "js.ds.exclude_others" : "js.ds.exclude"), () => actions.exclude(finding, others ? keys.slice(1) : keys), { icon: "hide", title: others ? t("js.ds.exclude_others_title", { name: names[0] }) : null }) : null;
    const ignore = K5.button(t(finding.ignored ? "js.ds.unignore" : "js.ds.ignore"), () => actions.ignore([finding], !finding.ignored), { kind: "plain" });
    return el("article.k5-ds-finding" + (finding.ignored || done.has(finding.id) ? ".ignored" : "") + (names.length > 1 ? ".several" : ""), { "data-finding": finding.id },
      el("div.k5-ds-finding-pictures", {}, pictures, rest > 0 ? el("span.k5-small", {}, t("js.ds.and_more", { n: rest })) : null),
      el("div.k5-ds-finding-text", {}, el("p", { title: finding.message }, ds.findingText(finding)),
        done.has(finding.id) ? el("p.k5-small", {}, t("js.ds.done_until_check")) : el("div.k5-tools", {}, fixes, out, ignore)));
  };

  // The facts of a finding from its numbers, in the page's language; what it means stands over its group. A finding
  // that the texts do not know speaks as the check wrote it.
  ds.findingText = (finding) => {
    const key = "js.ds.finding." + finding.kind;
    if (!K5.texts[key]) return finding.message;
    const values = { n: (finding.identities || []).length };
    for (const [name, value] of Object.entries(finding.values || {})) values[name] = (name === "seconds" ? seconds : plain)(value);
    const text = t(key, values);
    return /\{\w+\}/.test(text) ? finding.message : text;
  };
  const short = (value) => (typeof value === "number" ? String(Number(value.toFixed(2))) : String(value));
  const plain = (value) => (Array.isArray(value) ? value.map(short).join(", ") : short(value));
  // Moments, or [from, to] spans.
  const seconds = (value) => t("js.seconds", {
    n: [value].flat().slice(0, 5).map((one) => (Array.isArray(one) ? one.map(short).join("–") : short(one))).join(", ") + (value.length > 5 ? " …" : ""),
  });

  const makeGroup = (kind, make, done) => {
    const dot = el("span.k5-ds-dot", { "aria-hidden": "true" });
    const count = el("span.k5-ds-count");
    const body = el("div.k5-ds-findings");
    const more = K5.button(t("js.ds.show_more"), () => {
      shown += SHOWN;
      draw();
    }, { kind: "plain" });
    const all = K5.button("", null, { kind: "plain" });
    const head = el("summary", {}, el("span.k5-row", {}, dot, el("strong", {}, t("js.ds.kind_name." + kind)), count));
    const box = el("details.k5-ds-entry.k5-ds-group", { "data-kind": kind }, head, el("div.k5-ds-group-text", {}, el("p.k5-muted", {}, t("js.ds.kind_text." + kind)), all), body, more);
    all.replaceChildren(el("span", {}, t("js.ds.ignore_all")));
    let findings = [];
    let shown = SHOWN;
    const drawn = new Map();
    const draw = () => {
      const now = findings.slice(0, shown);
      const wanted = new Set(now.map((finding) => finding.id));
      for (const [id, row] of drawn) {
        if (!wanted.has(id)) {
          row.node.remove();
          drawn.delete(id);
        }
      }
      now.forEach((finding, index) => {
        const mark = JSON.stringify(finding) + done.has(finding.id);
        const row = drawn.get(finding.id);
        if (!row || row.mark !== mark) {
          const node = make(finding);
          if (row) row.node.replaceWith(node);
          drawn.set(finding.id, { node, mark });
        }
        const node = drawn.get(finding.id).node;
        if (body.children[index] !== node) body.insertBefore(node, body.children[index] || null);
      });
      more.hidden = findings.length <= shown;
    };
    const show = (list, ignoreAll) => {
      findings = list;
      dot.className = "k5-ds-dot " + ds.worst(list);
      dot.title = t("js.ds.severity." + ds.worst(list));
      set(count, ds.number(list.length));
      const open = list.filter((finding) => !finding.ignored);
      all.hidden = open.length < 2;
      all.onclick = () => ignoreAll(open, true);
      if (box.open) draw();
    };
    box.addEventListener("toggle", () => box.open && draw());
    return { box, show, open: () => (box.open = true) };
  };

  const makeProgress = (ctx, ended) => {
    const text = el("span.k5-live-line", { role: "status" });
    const numbers = el("span.k5-numbers");
    const bar = el("i");
    const stop = K5.button(t("js.stop"), async () => {
      await ctx.verb("stop", run);
    }, { icon: "stop" });
    const open = K5.button(t("js.open_run"), () => K5.openRun(run), { kind: "plain" });
    const box = el("div.k5-ds-progress", { hidden: true }, el("div.k5-row", {}, text, el("span.k5-grow"), open, stop), el("span.k5-bar", {}, bar), numbers);
    let run = null;
    const show = (now) => {
      const was = run;
      const active = now && (K5.running(now.state) || now.state === "queued");
      box.hidden = !active;
      run = active ? now.id : null;
      if (was && !active) ended(now);
      if (!active) return active;
      const live = K5.status && K5.status.running && K5.status.running.id === now.id ? { ...now, ...K5.status.running } : now;
      const done = live.step === undefined ? live.done : live.step;
      const total = live.total;
      set(text, live.state === "queued" ? t("js.ds.check_waits") : total ? t("js.ds.checking_n", { done: ds.number(done || 0), total: ds.number(total) }) : t("js.ds.checking"));
      set(numbers, [live.remaining_seconds ? t("js.left", { time: K5.seconds(live.remaining_seconds) }) : "", live.message || ""].filter(Boolean).join(" · "));
      bar.style.width = total ? (100 * (done || 0)) / total + "%" : "0";
      return true;
    };
    return { box, show };
  };

  ds.views.lint = (ctx) => {
    const trigger = el("input.k5-input", { type: "text", placeholder: t("js.ds.trigger_hint"), "aria-label": t("js.ds.trigger"), maxlength: "100" });
    const start = ds.primary(t("js.ds.check"), async () => {
      start.disabled = true;
      const answer = await ctx.verb("check", ctx.id(), trigger.value.trim() || null);
      if (answer.problems) K5.notice(answer.problems.map(ds.sentence).join("\n"), "bad");
      await refresh();
      start.disabled = active;
    });
    trigger.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !start.disabled) start.click();
    });
    const last = el("span.k5-small", { role: "status" });
    const ignoredBox = el("input", { type: "checkbox", onchange: () => draw() });
    const ignoredText = el("span");
    const ignored = el("label.k5-ds-switch", { hidden: true }, ignoredBox, ignoredText);
    const groups = el("div.k5-ds-entries");
    const clean = el("div.k5-empty", { hidden: true }, K5.icon("tick"), el("strong"), el("p"));
    const progress = makeProgress(ctx, (run) => {
      if (run && ["failed", "crashed"].includes(run.state)) K5.notice(t("js.ds.check_failed") + (run.message ? " " + run.message : ""), "bad");
    });
    const box = el("div.k5-ds-lint", {}, el("p.k5-muted", {}, t("js.ds.lint_text")),
      el("div.k5-ds-bar.k5-ds-check-bar", {}, el("label.k5-ds-trigger", {}, el("span.k5-label", {}, t("js.ds.trigger")), trigger), start),
      progress.box, el("div.k5-row.k5-ds-lint-line", {}, last, el("span.k5-grow"), ignored), clean, groups);
    let id = null;
    let page = null;
    let active = false;
    let wantedKind = null;
    let busy = false;
    let wordKnown = false; // the word of the last check stands in its field once; from then on it is the person's
    const kinds = new Map();
    let unreadable = new Set(); // sources that have no picture
    const done = new Set(); // findings that were acted on here; the next check decides
    let newest = null; // the newest check that ended

    const actions = {
      broken: (key) => unreadable.has(key),
      exclude: async (finding, keys) => {
        const answer = await ctx.verb("exclude", ctx.id(), keys, true);
        if (answer.conflict) K5.notice(answer.error, "bad");
        if (!answer.error) done.add(finding.id);
        if (!answer.error) K5.notice(t("js.ds.excluded_done", { what: ds.many("files", keys.length) }));
        ctx.changed();
        refresh();
      },
      fix: async (finding, fix) => {
        if (fix === "edit_caption") {
          ctx.open("items", { text: (finding.identities || [])[0] || "" });
          return;
        }
        const answer = await ctx.verb("fix_finding", ctx.id(), finding.id, fix);
        if (answer.conflict) K5.notice(answer.error, "bad");
        if (answer.problems) K5.notice(answer.problems.map(ds.sentence).join("\n"), "bad");
        if (!answer.error && !answer.problems) {
          done.add(finding.id);
          K5.notice(t("js.ds.fixed"));
        }
        ctx.changed();
        refresh();
      },
      ignore: async (findings, on) => {
        await ctx.verb("ignore_findings", ctx.id(), findings.map((finding) => finding.id), on);
        ctx.changed();
        refresh();
      },
    };
    const make = makeFinding(ctx, actions, done);

    const draw = () => {
      const findings = page.findings.filter((finding) => ignoredBox.checked || !finding.ignored);
      const hidden = page.findings.length - page.findings.filter((finding) => !finding.ignored).length;
      ignored.hidden = hidden === 0;
      set(ignoredText, t("js.ds.show_ignored", { n: ds.number(hidden) }));
      ctx.count("lint", page.findings.length - hidden);
      const byKind = new Map();
      for (const finding of findings) byKind.set(finding.kind, [...(byKind.get(finding.kind) || []), finding]);
      const order = [...byKind].sort((a, b) => ORDER[ds.worst(a[1])] - ORDER[ds.worst(b[1])] || b[1].length - a[1].length);
      for (const [kind, group] of kinds) {
        if (!byKind.has(kind)) {
          group.box.remove();
          kinds.delete(kind);
        }
      }
      order.forEach(([kind, list], index) => {
        if (!kinds.has(kind)) {
          kinds.set(kind, makeGroup(kind, make, done));
          if (index < 2 || findings.length <= FEW) kinds.get(kind).open();
        }
        const group = kinds.get(kind);
        group.show(list, actions.ignore);
        if (groups.children[index] !== group.box) groups.insertBefore(group.box, groups.children[index] || null);
      });
      if (wantedKind && kinds.has(wantedKind)) {
        kinds.get(wantedKind).open();
        kinds.get(wantedKind).box.scrollIntoView({ block: "nearest" });
        wantedKind = null;
      }
      const checked = page.run && page.run.state === "finished";
      clean.hidden = findings.length > 0 || active;
      const never = !page.run;
      clean.firstChild.replaceWith(K5.icon(never || !checked ? "search" : "tick"));
      set(clean.children[1], t(never ? "js.ds.never_checked" : checked ? "js.ds.all_good" : "js.ds.not_checked"));
      set(clean.children[2], t(never ? "js.ds.never_checked_text" : checked ? "js.ds.all_good_text" : "js.ds.not_checked_text"));
      const when = page.run && (page.run.finished || page.run.ended || page.run.created);
      set(last, [checked && when ? t("js.ds.checked_at", { time: K5.moment(when) }) : "", page.stale && checked ? t("js.ds.stale") : ""].filter(Boolean).join(" · "));
      K5.toggle(last, "stale", page.stale && checked);
    };
    const refresh = async () => {
      if (busy || !K5.shown(box)) return;
      busy = true;
      try {
        const asked = ctx.id();
        const answer = await K5.get(ctx.path("/lint"));
        if (asked === ctx.id()) {
          page = answer;
          if (!trigger.value && !wordKnown && page.trigger_word) trigger.value = page.trigger_word;
          wordKnown = true;
          unreadable = new Set(page.findings.filter((finding) => finding.kind === "broken").flatMap((finding) => finding.keys));
          if (page.run && page.run.id !== newest && !K5.running(page.run.state) && page.run.state !== "queued") {
            newest = page.run.id;
            done.clear();
          }
          active = Boolean(progress.show(page.run));
          start.disabled = active;
          draw();
        }
      } catch (error) {
        set(last, ""); // the header says that the server is away
      }
      busy = false;
    };
    const update = (detail, opened) => {
      if (id !== detail.id) {
        id = detail.id;
        kinds.clear();
        wordKnown = false;
        trigger.value = "";
        done.clear();
        groups.replaceChildren();
        clean.hidden = true;
      }
      if (opened && ctx.seek) {
        wantedKind = ctx.seek.kind || null;
        ctx.seek = null;
      }
      refresh();
    };
    // Between two answers the status of the page moves the bar; when the check has ended the answer is asked for at once.
    K5.on("status", (status) => {
      if (!active || !status || !K5.shown(box)) return;
      if (status.running && status.running.id === page.run.id) progress.show(page.run);
      else refresh();
    });
    return { box, update, tick: refresh };
  };
})();
