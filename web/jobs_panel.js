// The side panel "Kandinsky 5 jobs": training jobs as they run; what it knows it reads from the server every two seconds.
import { app } from "../../scripts/app.js";
import { Unreachable, changeJob, jobDetails, jobLog, jobProgress, listJobs } from "./jobs_api.js";
import { JobDetails } from "./jobs_details.js";
import { el, icon, setText } from "./jobs_dom.js";
import { JobList } from "./jobs_list.js";
import { t } from "./jobs_text.js";

const TAB = "kandinsky5-jobs";
const POLL_MS = 2000;
const SLOWEST_MS = 10000;
const LOG_BYTES = 20000;
const SELECTED = "kandinsky5.jobs.selected";

function stylesheet(file) {
  const href = new URL(file, import.meta.url).href;
  if (!document.querySelector(`link[href="${href}"]`)) document.head.append(el("link", { rel: "stylesheet", href }));
}

// Private windows may refuse storage; then the newest job is shown.
const remembered = {
  get: () => { try { return localStorage.getItem(SELECTED); } catch { return null; } },
  set: (id) => { try { localStorage.setItem(SELECTED, id); } catch { /* not kept */ } },
};

class JobsPanel {
  constructor() {
    this.selected = null;
    this.list = new JobList((id) => this.choose(id));
    this.details = new JobDetails((action) => this.act(action), (text) => this.say("success", text));
    this.banner = el("div", { className: "k5-banner", role: "status", hidden: true }, icon("spin pi-spinner"), el("span", { textContent: t("unreachable") }));
    this.emptyText = el("p", { textContent: t("loading") });
    this.emptyHint = el("p", { className: "k5-muted" });
    this.empty = el("div", { className: "k5-empty" }, icon("chart-line"), this.emptyText, this.emptyHint);
    this.body = el("div", { className: "k5-body", hidden: true }, this.list.element, this.details.element);
    const head = el("header", { className: "k5-title" }, el("span", { textContent: t("title") }));
    this.root = el("div", { className: "k5-panel k5-jobs" }, head, this.banner, this.empty, this.body);
    this.forget();
    this.woken = () => document.hidden || this.poll();
    document.addEventListener("visibilitychange", this.woken);
  }

  // ComfyUI may take the panel out of the page without a word, and hides it in its focus mode.
  get visible() {
    return !document.hidden && this.root.getClientRects().length > 0;
  }

  // What was read of the selected job.
  forget() {
    this.seen = { steps: "", more: "", log: "" };
  }

  async poll() {
    clearTimeout(this.timer);
    if (this.closed || (this.attached && !this.root.isConnected)) return this.close();
    this.attached ||= this.root.isConnected;
    // Asked for while an answer is awaited: once more after it.
    this.again = this.polling;
    if (this.polling) return;
    const began = performance.now();
    if (this.visible) {
      this.polling = true;
      try {
        await this.refresh();
        this.banner.hidden = true;
      } catch (error) {
        this.banner.hidden = false;
        setText(this.banner.querySelector("span"), error instanceof Unreachable ? t("unreachable") : error.message);
      } finally {
        this.polling = false;
      }
    }
    clearTimeout(this.timer);
    // A server that is slow to answer is asked less often.
    const pause = Math.min(Math.max(POLL_MS, 5 * (performance.now() - began)), SLOWEST_MS);
    if (!this.closed) this.timer = setTimeout(() => this.poll(), this.again ? 0 : pause);
  }

  async refresh() {
    this.jobs = await listJobs();
    this.showJobs();
    const job = this.job;
    if (!job) return;
    try {
      await this.readMore(job);
    } catch (error) {
      // It was deleted between the two questions: the next list tells.
      if (error.status !== 404) throw error;
    }
  }

  get job() {
    return this.jobs?.find((job) => job.id === this.selected);
  }

  showJobs() {
    if (!this.job && this.jobs.length) {
      const last = this.jobs.find((job) => job.id === remembered.get());
      this.select((last ?? this.jobs[0]).id);
    }
    this.body.hidden = !this.jobs.length;
    this.empty.hidden = this.jobs.length > 0;
    setText(this.emptyText, t("empty"));
    const node = window.LiteGraph?.registered_node_types?.K5StartTraining?.title ?? "Start Kandinsky 5 Training";
    setText(this.emptyHint, t("emptyHint", { node }));
    this.list.show(this.jobs, this.selected);
    if (this.job) this.details.show(this.job);
  }

  // Each route of the selected job is asked only when the list says that there is more.
  async readMore(job) {
    const steps = `${job.updated} ${job.step} ${job.state}`;
    if (job.running || this.seen.steps !== steps) {
      const answer = await jobProgress(job.id, this.details.chart.last);
      if (this.selected !== job.id) return;
      if (!this.details.chart.add(answer)) {
        const all = await jobProgress(job.id, 0);
        if (this.selected !== job.id) return;
        this.details.chart.add(all);
      }
      this.seen.steps = steps;
    }
    const more = `${job.num_samples} ${job.state}`;
    if (this.seen.more !== more) {
      const details = await jobDetails(job.id);
      if (this.selected !== job.id) return;
      this.details.showMore(details);
      this.seen.more = more;
    }
    const log = String(job.log_bytes);
    if (this.details.log.wanted && this.seen.log !== log) {
      const answer = await jobLog(job.id, LOG_BYTES);
      if (this.selected !== job.id) return;
      this.details.log.show(answer.text);
      this.seen.log = log;
    }
  }

  select(id) {
    this.selected = id;
    remembered.set(id);
    this.forget();
    this.details.reset(id);
  }

  choose(id) {
    if (id !== this.selected) this.select(id);
    this.showJobs();
    this.poll();
  }

  async act(action) {
    const job = this.job;
    if (!job || (action === "delete" && !(await this.confirmed(job)))) return;
    try {
      await changeJob(job.id, action);
    } catch (error) {
      this.say("error", error instanceof Unreachable ? t("unreachable") : error.message);
    }
    this.poll();
  }

  confirmed(job) {
    const question = { title: t("deleteTitle"), message: t("deleteMessage"), itemList: [`${job.name} (${job.id})`], type: "delete" };
    const ask = app.extensionManager.dialog?.confirm;
    return ask ? ask(question) : window.confirm(`${question.title}\n${question.message}\n${job.id}`);
  }

  say(severity, text) {
    const error = severity === "error";
    app.extensionManager.toast.add({ severity, summary: error ? t("failed") : text, detail: error ? text : undefined, life: error ? 8000 : 1500 });
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    document.removeEventListener("visibilitychange", this.woken);
    this.details.close();
  }
}

app.registerExtension({
  name: "kandinsky5.jobs",
  setup() {
    let panel = null;
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-chart-line",
      title: t("title"),
      tooltip: t("title"),
      label: t("short"),
      type: "custom",
      // ComfyUI calls this again for the same element whenever it draws its side bar.
      render(container) {
        if (panel && !panel.closed && panel.root.parentElement === container) return;
        panel?.close();
        stylesheet("./vendor/uplot/uPlot.min.css");
        stylesheet("./jobs_panel.css");
        panel = new JobsPanel();
        container.style.height = "100%";
        container.replaceChildren(panel.root);
        panel.poll();
      },
      destroy() {
        panel?.close();
        panel = null;
      },
    });
  },
});
