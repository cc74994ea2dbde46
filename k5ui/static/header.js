/* The bar over all tabs: name, the running job, queue, device, theme and language. */
(() => {
  "use strict";
  const { el, set, t } = K5;

  K5.parts.header = (root, { server }) => {
    const bar = el("i");
    const jobText = el("span.k5-job-text", {}, t("js.idle"));
    const job = el("button.k5-job", { type: "button", title: t("js.open_run"), disabled: true },
      jobText, el("span.k5-bar", {}, bar));
    const queue = el("span.k5-queue-count");
    const device = el("span.k5-device");
    const offline = el("span.k5-offline", { role: "alert" });
    let shownRun = null;
    job.addEventListener("click", () => shownRun && K5.openRun(shownRun));

    const themes = ["auto", "light", "dark"];
    const icons = { auto: "auto", light: "sun", dark: "moon" };
    const themeButton = K5.button("", async () => {
      const next = themes[(themes.indexOf(K5.theme) + 1) % themes.length];
      K5.setTheme(next);
      showTheme();
      await K5.ask(server, "set_preference", "theme", next);
    }, { icon: "auto", kind: "plain" });
    const showTheme = () => {
      themeButton.replaceChildren(K5.icon(icons[K5.theme] || "auto"));
      const label = t("js.theme." + K5.theme);
      themeButton.title = label;
      themeButton.setAttribute("aria-label", label);
    };
    showTheme();
    const other = K5.language === "ru" ? "en" : "ru";
    const languageButton = K5.button(other.toUpperCase(), async () => {
      const answer = await K5.ask(server, "set_preference", "language", other);
      if (answer && !answer.error) location.reload();
    }, { kind: "plain", title: other === "ru" ? "Русский" : "English" });
    languageButton.setAttribute("lang", other);

    root.append(
      el("div.k5-brand", {}, el("span.k5-logo", { "aria-hidden": "true" }), el("strong", {}, "K5 Studio")),
      job, queue, offline, el("span.k5-grow"), device, themeButton, languageButton,
    );

    const show = (status) => {
      set(offline, status ? status.queue_problem || "" : t("js.offline"));
      if (!status) return;
      const run = status.running;
      shownRun = run ? run.id : null;
      job.disabled = !run;
      K5.toggle(job, "on", run);
      bar.style.width = K5.percent(run) + "%";
      set(jobText, run ? doing(run).filter(Boolean).join(" · ") : t("js.idle"));
      const waiting = (status.queue || []).length;
      set(queue, waiting ? t("js.waiting", { n: waiting }) : "");
      set(device, deviceText(status.device || {}));
    };
    const phase = (run) => (run.phase && run.state === "running" ? K5.phaseName(run) : K5.stateName(run.state));
    const doing = (run) => {
      if (run.kind === "generate") return [(run.phase === "denoise" && K5.progressText(run)) || phase(run), run.title];
      return [t("js.kind." + run.kind), (run.state === "running" && K5.progressText(run)) || phase(run), run.item_name || run.title];
    };
    const deviceText = (value) => {
      const parts = [value.name || ""];
      if (value.memory_total) {
        parts.push(t("js.memory", { used: K5.gigabytes(value.memory_used || 0), total: K5.gigabytes(value.memory_total) }));
      }
      return parts.filter(Boolean).join(" · ");
    };
    K5.on("status", show);
    if (K5.status) show(K5.status);
  };
})();
