// One job: what can be done with it, its figures, its loss, its samples, its log.
import { LossChart } from "./jobs_chart.js";
import { button, copyText, el, icon, setText } from "./jobs_dom.js";
import { showState, stateChip, stepText } from "./jobs_list.js";
import { Samples } from "./jobs_samples.js";
import { duration, gibibytes, number, t } from "./jobs_text.js";

const FACTS = ["step", "loss", "best", "time", "leftFact", "memory", "model", "trains"];

function pace(job) {
  const left = job.num_steps - job.step;
  return job.running && job.seconds_left > 0 && left > 0 ? t("pace", { time: number(job.seconds_left / left, 2) }) : "";
}

export class JobDetails {
  // `act(action)` changes the job, `say(text)` tells the user.
  constructor(act, say) {
    this.name = el("h3", { className: "k5-name" });
    this.chip = stateChip();
    this.id = el("code");
    const copyId = button(t("copyId"), "copy", () => copyText(this.id.textContent).then(() => say(t("copied"))), { kind: "quiet small", iconOnly: true });
    this.buttons = {
      stop: button(t("stop"), "stop-circle", () => act("stop"), { name: t("stopHint") }),
      resume: button(t("resume"), "play", () => act("resume"), { kind: "primary", name: t("resumeHint") }),
      open: button(t("open"), "folder-open", () => act("open")),
      delete: button(t("delete"), "trash", () => act("delete"), { kind: "danger", iconOnly: true, name: t("deleteHint") }),
    };
    for (const [action, element] of Object.entries(this.buttons)) element.dataset.action = action;
    this.message = el("p", { className: "k5-message", role: "status" });
    this.facts = el("dl", { className: "k5-facts" });
    this.figures = Object.fromEntries(FACTS.map((name) => [name, this.fact(name)]));
    this.resultPath = el("bdi", { dir: "ltr" });
    const copyResult = button(t("copyResult"), "copy", () => copyText(this.resultPath.textContent).then(() => say(t("copied"))), { kind: "quiet small", iconOnly: true });
    this.result = el("div", { className: "k5-result" }, icon("check-circle"), el("span", { textContent: t("result") }), el("code", {}, this.resultPath), copyResult);
    this.chart = new LossChart();
    this.samples = new Samples();
    this.log = new LogTail();
    this.scan = el("pre", { className: "k5-log", tabIndex: 0, "aria-label": t("material") });
    this.material = el("details", { className: "k5-section" }, el("summary", { textContent: t("material") }), this.scan);
    this.element = el(
      "div", { className: "k5-details" },
      el("div", { className: "k5-line" }, this.name, this.chip),
      el("div", { className: "k5-id" }, this.id, copyId),
      el("div", { className: "k5-buttons" }, ...Object.values(this.buttons)),
      this.message, this.facts, this.result, this.chart.element, this.samples.element, this.material, this.log.element,
    );
  }

  fact(name) {
    const value = el("dd");
    const label = t(name === "step" ? "stepName" : name);
    this.facts.append(el("div", {}, el("dt", { textContent: label }), value));
    return value;
  }

  // Another job.
  reset(job) {
    this.chart.reset();
    this.samples.reset(job);
    this.log.reset();
    setText(this.scan, "");
    this.material.hidden = true;
  }

  // What the list tells.
  show(job) {
    setText(this.name, job.name);
    setText(this.id, job.id);
    showState(this.chip, job);
    this.buttons.stop.hidden = !job.running;
    this.buttons.stop.disabled = job.stopping;
    setText(this.buttons.stop.querySelector("span"), t(job.stopping ? "stopping" : "stop"));
    this.buttons.resume.hidden = !job.can_resume;
    this.buttons.delete.disabled = job.running;
    const message = job.error || job.message || pace(job);
    setText(this.message, message);
    // While it runs the line stays, so that what is below does not jump with every message.
    this.message.hidden = !job.running && (!message || (job.state === "done" && Boolean(job.result)));
    this.message.classList.toggle("k5-now", job.running && !job.error);
    this.message.classList.toggle("k5-bad", Boolean(job.error) || ["failed", "lost"].includes(job.state));
    const trains = { full: t("full"), cache: t("cache") }[job.trains] ?? job.trains;
    const figures = {
      step: job.num_steps ? `${number(job.step, 9)} / ${number(job.num_steps, 9)}` : "—", loss: number(job.loss), best: number(job.best_loss),
      time: job.seconds > 0 ? duration(job.seconds) : "—", leftFact: job.running && job.seconds_left !== null ? duration(job.seconds_left) : "—",
      memory: gibibytes(job.peak_bytes), model: job.model || "—", trains: trains || "—",
    };
    for (const name of FACTS) {
      setText(this.figures[name], figures[name]);
      this.figures[name].title = figures[name];
    }
    setText(this.resultPath, job.result);
    this.resultPath.title = job.result;
    this.result.hidden = !job.result;
    this.element.setAttribute("aria-label", `${job.name}, ${stepText(job)}`);
  }

  // What the job's own route tells.
  showMore(details) {
    this.samples.show(details.samples, details.prompts);
    setText(this.scan, details.scan);
    this.material.hidden = !details.scan;
  }

  close() {
    this.chart.close();
    this.samples.close();
  }
}

// The end of the log; follows it unless one has scrolled up to read.
class LogTail {
  constructor() {
    this.text = el("pre", { className: "k5-log", tabIndex: 0, "aria-label": t("log") });
    this.element = el("details", { className: "k5-section", open: true, ontoggle: () => this.follow() }, el("summary", { textContent: t("log") }), this.text);
    this.reset();
  }

  get wanted() {
    return this.element.open;
  }

  reset() {
    setText(this.text, t("logEmpty"));
  }

  show(text) {
    const follows = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 24;
    // Progress bars go over their own line with \r: the last state stands.
    const lines = text.replace(/\r\n/g, "\n").split("\n").map((line) => line.replace(/\r+$/, "").split("\r").at(-1));
    setText(this.text, lines.join("\n").trimEnd() || t("logEmpty"));
    if (follows) this.follow();
  }

  follow() {
    this.text.scrollTop = this.text.scrollHeight;
  }
}
