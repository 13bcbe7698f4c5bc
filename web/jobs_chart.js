// The loss of a job over its steps, live: each step, smoothed, and the validation's points.
import uPlot from "./vendor/uplot/uPlot.esm.js";
import { button, el, setText } from "./jobs_dom.js";
import { number, t } from "./jobs_text.js";

const HEIGHT = 210;
const SPARE_POINTS = 4000;
const value = (part) => (Number.isFinite(part) ? part : null);

export class LossChart {
  constructor() {
    this.box = el("div", { className: "k5-chart", role: "img" });
    this.note = el("p", { className: "k5-note" });
    this.scaleButton = button("log", "sort-amount-up-alt", () => this.toggleScale(), { kind: "quiet small", name: t("logScale") });
    this.scaleButton.setAttribute("aria-pressed", "false");
    this.empty = el("p", { className: "k5-note", textContent: t("chartEmpty") });
    const head = el("div", { className: "k5-head" }, el("h4", { textContent: t("chart") }), this.scaleButton);
    this.element = el("section", { className: "k5-section" }, head, this.empty, this.box, this.note);
    this.logarithmic = false;
    this.sizes = new ResizeObserver(() => this.fit());
    this.sizes.observe(this.box);
    // Colours come from ComfyUI's palette, which may change while the panel is open.
    this.palette = new MutationObserver(() => this.plot?.redraw(false));
    for (const node of [document.documentElement, document.body])
      this.palette.observe(node, { attributes: true, attributeFilter: ["class", "style"] });
    this.reset();
  }

  reset() {
    this.points = new Map();
    this.last = 0;
    this.draw();
  }

  // Takes an answer of the progress route. False: the job went back to a checkpoint, so ask for everything again.
  add(answer) {
    if (answer.last < this.last || this.points.size > SPARE_POINTS) {
      const redo = answer.after > 0;
      this.points.clear();
      this.last = 0;
      if (redo) return false;
    }
    for (const point of answer.points) this.points.set(point.step, point);
    if (answer.after === 0)
      setText(this.note, answer.downsampled ? t("thinned", { shown: number(answer.points.length, 9), total: number(answer.total, 9) }) : "");
    const changed = answer.points.length > 0 || answer.after === 0;
    this.last = answer.last;
    if (changed) this.draw();
    return true;
  }

  columns() {
    const points = [...this.points.values()].sort((a, b) => a.step - b.step);
    const seen = (part) => (this.logarithmic && !(part > 0) ? null : value(part));
    return [points.map((p) => p.step), ...["loss", "smoothed", "validation"].map((name) => points.map((p) => seen(p[name])))];
  }

  draw() {
    const data = this.columns();
    const some = data[0].length > 0;
    this.empty.hidden = some;
    this.box.hidden = this.scaleButton.hidden = !some;
    if (!some) {
      this.plot?.destroy();
      this.plot = null;
      return;
    }
    const latest = this.points.get(data[0].at(-1));
    this.box.setAttribute("aria-label", `${t("chart")}: ${t("sampleStep", { step: latest.step })}, ${number(latest.smoothed ?? latest.loss)}`);
    if (this.plot) this.plot.setData(data, !this.zoomed());
    else this.make(data);
  }

  make(data) {
    this.plot?.destroy();
    this.plot = new uPlot(this.options(), data, this.box);
    for (const label of this.box.querySelectorAll(".u-series th")) {
      label.tabIndex = 0;
      label.setAttribute("role", "button");
      label.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          label.click();
        }
      });
    }
  }

  // Someone looks at a part: new steps must not throw them out of it.
  zoomed() {
    const { min, max } = this.plot.scales.x;
    const steps = this.plot.data[0];
    return min > steps[0] || max < steps.at(-1);
  }

  toggleScale() {
    this.logarithmic = !this.logarithmic;
    this.scaleButton.setAttribute("aria-pressed", String(this.logarithmic));
    this.plot?.destroy();
    this.plot = null;
    this.draw();
  }

  fit() {
    const width = this.box.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  colour(name, fallback) {
    return getComputedStyle(this.element).getPropertyValue(name).trim() || fallback;
  }

  options() {
    const text = () => this.colour("--k5-muted", "#999");
    const axis = {
      stroke: text, font: "11px Inter, sans-serif", ticks: { show: false },
      grid: { stroke: () => this.colour("--k5-line", "#444"), width: 1 },
    };
    const primary = () => this.colour("--k5-accent", "#31b9f4");
    const gold = () => this.colour("--k5-gold", "#fd9903");
    // Where nobody points at a step, the legend tells the latest values.
    const shown = (plot, part, series, at) => number(at === null ? plot.data[series].findLast((one) => one !== null) : part);
    return {
      width: Math.max(200, this.box.clientWidth), height: HEIGHT, padding: [10, 14, 0, 0],
      scales: { x: { time: false }, y: { distr: this.logarithmic ? 3 : 1 } },
      axes: [
        { ...axis, space: 60, size: 28, values: (_, marks) => marks.map((mark) => (Number.isInteger(mark) ? number(mark, 6) : "")) },
        { ...axis, size: 50, values: (_, marks) => marks.map((mark) => (mark === null ? "" : number(mark, 3))) },
      ],
      series: [
        { label: t("stepName"), value: (plot, step, series, at) => number(at === null ? plot.data[0].at(-1) : step, 9) },
        { label: t("raw"), stroke: primary, alpha: 0.4, width: 1, points: { show: false }, value: shown },
        { label: t("smoothed"), stroke: primary, width: 2, points: { show: false }, value: shown },
        { label: t("validation"), stroke: gold, width: 1, dash: [4, 4], spanGaps: true, value: shown,
          points: { show: true, size: 7, fill: gold, stroke: gold, filter: (plot, series) => plot.data[series].flatMap((part, at) => (part === null ? [] : [at])) } },
      ],
      legend: { live: true },
      cursor: { y: false, drag: { x: true, y: false } },
    };
  }

  close() {
    this.sizes.disconnect();
    this.palette.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }
}
