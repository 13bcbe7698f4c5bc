// The pack's routes (nodes/bridge/routes.py).
import { api } from "../../scripts/api.js";

const ROOT = "/kandinsky5/jobs";
const PATIENCE_MS = 15000;

// The server gave no answer at all; `RouteError`: it did, and says why not.
export class Unreachable extends Error {}
export class RouteError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(route, options = {}) {
  let response;
  try {
    response = await api.fetchApi(ROOT + route, { ...options, signal: AbortSignal.timeout(PATIENCE_MS) });
  } catch (error) {
    throw new Unreachable(String(error));
  }
  // A proxy in front of a stopped server answers too.
  if ([502, 503, 504].includes(response.status)) throw new Unreachable(String(response.status));
  let answer;
  try {
    answer = await response.json();
  } catch {
    throw new RouteError(response.status, `${ROOT}${route}: HTTP ${response.status}`);
  }
  if (!response.ok) throw new RouteError(response.status, answer.error ?? `HTTP ${response.status}`);
  return answer;
}

const at = (id) => `/${encodeURIComponent(id)}`;

export const listJobs = async () => (await ask("")).jobs;
export const jobDetails = (id) => ask(at(id));
export const jobProgress = (id, after) => ask(`${at(id)}/progress?after=${after}`);
export const jobLog = (id, bytes) => ask(`${at(id)}/log?bytes=${bytes}`);
export const changeJob = (id, action) =>
  ask(`${at(id)}/${action}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });
export const sampleUrl = (id, step, file) => api.apiURL(`${ROOT}${at(id)}/samples/${step}/${encodeURIComponent(file)}`);
