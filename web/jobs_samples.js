// Samples of a job, a row for each step that made some, newest first; a click shows one large.
import { sampleUrl } from "./jobs_api.js";
import { arrange, button, el, setText } from "./jobs_dom.js";
import { number, t } from "./jobs_text.js";

const ROWS = 8;
const AGAIN_MS = 5000;

function media(job, step, sample) {
  const src = sampleUrl(job, step, sample.file);
  const element = sample.kind === "image"
    ? el("img", { alt: "", loading: "lazy", decoding: "async", draggable: false })
    : el("video", { muted: true, loop: true, playsInline: true, preload: "metadata", tabIndex: -1 });
  // The server may be away just then.
  element.addEventListener("error", () => setTimeout(() => element.isConnected && (element.src = src), AGAIN_MS));
  element.src = src;
  return element;
}

// Small pictures are shown in their own pixels.
function sharpen(element) {
  const check = () => {
    const width = element.naturalWidth ?? element.videoWidth;
    if (width > 0 && width < 200) element.classList.add("k5-pixels");
  };
  element.addEventListener(element.tagName === "VIDEO" ? "loadedmetadata" : "load", check);
  return element;
}

export class Samples {
  constructor() {
    this.rows = el("div", { className: "k5-rows" });
    this.note = el("p", { className: "k5-note" });
    this.more = button("", "angle-down", () => this.showAll(), { kind: "quiet small" });
    this.element = el("section", { className: "k5-section" }, el("h4", { textContent: t("samples") }), this.note, this.rows, this.more);
    this.viewer = new Viewer();
    this.reset(null);
  }

  reset(job) {
    this.job = job;
    this.made = new Map();
    this.all = false;
    this.show([], []);
  }

  showAll() {
    this.all = true;
    this.show(this.samples, this.prompts);
  }

  show(samples, prompts) {
    [this.samples, this.prompts] = [samples, prompts];
    const newest = samples.filter((row) => row.files.length > 0).reverse();
    const shown = this.all ? newest : newest.slice(0, ROWS);
    setText(this.note, shown.length ? "" : t(this.job && prompts.length === 0 ? "noSamples" : "samplesEmpty"));
    this.note.hidden = shown.length > 0;
    this.more.hidden = shown.length === newest.length;
    const label = t("earlier", { count: newest.length - shown.length });
    setText(this.more.querySelector("span"), label);
    this.more.title = label;
    this.more.setAttribute("aria-label", label);
    arrange(this.rows, shown.map((row) => this.row(row)));
  }

  // A row stays as it was made unless it has other files now.
  row({ step, files }) {
    const key = `${step}:${files.map((sample) => sample.file).join(",")}`;
    if (!this.made.has(key)) {
      const strip = el("div", { className: "k5-strip" }, ...files.map((sample, at) => this.thumbnail(step, sample, at)));
      this.made.set(key, el("div", { className: "k5-row", "data-step": step }, el("div", { className: "k5-row-name", textContent: t("sampleStep", { step: number(step, 9) }) }), strip));
    }
    return this.made.get(key);
  }

  thumbnail(step, sample, at) {
    const picture = sharpen(media(this.job, step, sample));
    const name = t("sampleOf", { step, prompt: sample.prompt || sample.file });
    const play = () => picture.play?.().catch(() => {});
    const pause = () => picture.pause?.();
    return el(
      "button",
      {
        type: "button", className: "k5-thumb", title: name, "aria-label": name, "data-file": sample.file,
        onclick: () => this.viewer.open(this.job, this.samples, step, at),
        onmouseenter: play, onfocus: play, onmouseleave: pause, onblur: pause,
      },
      picture,
      el("span", { className: "k5-thumb-text", textContent: sample.prompt || sample.file }),
    );
  }

  close() {
    this.viewer.close();
  }
}

// One sample over the whole page; arrow keys go through steps and prompts.
class Viewer {
  constructor() {
    this.frame = el("div", { className: "k5-viewer-frame" });
    this.caption = el("p", { className: "k5-viewer-prompt" });
    this.where = el("span", { className: "k5-viewer-where" });
    const bar = el(
      "div", { className: "k5-viewer-bar" },
      button(t("previousStep"), "angle-left", () => this.go(-1, 0), { iconOnly: true }),
      this.where,
      button(t("nextStep"), "angle-right", () => this.go(1, 0), { iconOnly: true }),
      button(t("previousPrompt"), "angle-up", () => this.go(0, -1), { iconOnly: true }),
      button(t("nextPrompt"), "angle-down", () => this.go(0, 1), { iconOnly: true }),
      el("span", { className: "k5-space" }),
      button(t("close"), "times", () => this.close(), { iconOnly: true }),
    );
    this.dialog = el("dialog", { className: "k5-panel k5-viewer", onkeydown: (event) => this.key(event), onclick: (event) => event.target === this.dialog && this.close() }, bar, this.frame, this.caption);
    this.dialog.addEventListener("close", () => {
      this.frame.replaceChildren();
      this.dialog.remove();
    });
  }

  open(job, samples, step, at) {
    this.job = job;
    this.samples = samples.filter((row) => row.files.length > 0);
    this.row = this.samples.findIndex((row) => row.step === step);
    this.at = at;
    document.body.append(this.dialog);
    this.show();
    this.dialog.showModal();
  }

  go(rows, columns) {
    this.row = Math.min(Math.max(this.row + rows, 0), this.samples.length - 1);
    this.at = Math.min(Math.max(this.at + columns, 0), this.samples[this.row].files.length - 1);
    this.show();
  }

  show() {
    const { step, files } = this.samples[this.row];
    const sample = files[this.at];
    const large = sharpen(media(this.job, step, sample));
    if (sample.kind === "video") Object.assign(large, { controls: true, autoplay: true });
    large.setAttribute("aria-label", t("sampleOf", { step, prompt: sample.prompt || sample.file }));
    this.frame.replaceChildren(large);
    setText(this.where, t("sampleStep", { step: number(step, 9) }));
    setText(this.caption, sample.prompt || sample.file);
    this.dialog.setAttribute("aria-label", t("sampleOf", { step, prompt: sample.prompt || sample.file }));
  }

  key(event) {
    // ComfyUI has shortcuts of its own for many keys.
    event.stopPropagation();
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (moves[event.key] && event.target.tagName !== "VIDEO") {
      event.preventDefault();
      this.go(...moves[event.key]);
    }
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }
}
