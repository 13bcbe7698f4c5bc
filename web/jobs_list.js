// Every job in a row: name, state, how far it is.
import { arrange, el, setText } from "./jobs_dom.js";
import { duration, number, stateName, t } from "./jobs_text.js";

// Before the first step, what it does instead.
const atText = (job) => (job.running && job.step === 0 && job.message) || stepText(job);

export const stepText = (job) => (job.num_steps ? t("step", { step: number(job.step, 9), total: number(job.num_steps, 9) }) : "");

// Share of the steps that are done, 0 to 1.
const share = (job) => (job.state === "done" ? 1 : job.num_steps ? Math.min(1, job.step / job.num_steps) : 0);

export function timeText(job) {
  if (job.running) return job.seconds_left === null ? "" : t("left", { time: duration(job.seconds_left) });
  return job.seconds > 0 ? t("took", { time: duration(job.seconds) }) : "";
}

export function stateChip() {
  return el("span", { className: "k5-chip" });
}

export function showState(chip, job) {
  setText(chip, job.stopping ? t("stopping") : stateName(job.state));
  chip.dataset.state = job.state;
  chip.classList.toggle("k5-live", job.running);
}

export class JobList {
  constructor(choose) {
    this.choose = choose;
    this.rows = new Map();
    this.element = el("ul", { className: "k5-list", "aria-label": t("jobs") });
  }

  show(jobs, selected) {
    const ids = new Set(jobs.map((job) => job.id));
    for (const id of this.rows.keys()) if (!ids.has(id)) this.rows.delete(id);
    arrange(this.element, jobs.map((job) => this.row(job, job.id === selected)));
  }

  row(job, chosen) {
    if (!this.rows.has(job.id)) this.rows.set(job.id, this.make(job.id));
    const row = this.rows.get(job.id);
    const { name, chip, steps, time, bar, choose } = row.parts;
    setText(name, job.name);
    showState(chip, job);
    setText(steps, atText(job));
    setText(time, timeText(job));
    bar.value = share(job);
    bar.hidden = !job.running && job.state !== "stopped";
    bar.setAttribute("aria-label", stepText(job) || stateName(job.state));
    choose.setAttribute("aria-current", String(chosen));
    return row;
  }

  make(id) {
    const parts = {
      name: el("span", { className: "k5-name" }), chip: stateChip(), steps: el("span", { className: "k5-cut" }), time: el("span"),
      bar: el("progress", { className: "k5-bar", max: 1 }),
    };
    parts.choose = el(
      "button", { type: "button", className: "k5-job", title: id, "data-job": id, onclick: () => this.choose(id) },
      el("span", { className: "k5-line" }, parts.name, parts.chip),
      el("span", { className: "k5-line k5-muted" }, parts.steps, parts.time),
      parts.bar,
    );
    const row = el("li", {}, parts.choose);
    row.parts = parts;
    return row;
  }
}
