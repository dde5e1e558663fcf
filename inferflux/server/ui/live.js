// The live picture: what the metrics say now, and how it moved over the last two minutes.

import { metrics } from "/ui/api.js";
import { byId, fillTable, make } from "/ui/dom.js";

const HISTORY = 60;
// Latencies are medians over this many moments (2 s each), so that they do not vanish between two requests.
const WINDOW = 15;
const TIERS = ["device", "cpu", "nvme"];
const TOTALS = [
  // Those for a model: probes, scrapes and this page's own looks would outnumber them.
  ["Requests to models", "inferflux_requests_total", (labels) => labels.model !== ""],
  ["Prompt tokens", "inferflux_prompt_tokens_total"],
  ["Tokens generated", "inferflux_generation_tokens_total"],
  ["Prompt tokens from the prefix cache", "inferflux_prefix_cache_hit_tokens_total"],
  ["Preemptions", "inferflux_preemptions_total"],
  ["Failed authentications", "inferflux_auth_failures_total"],
  ["Rate limited", "inferflux_rate_limited_total"],
  ["Guardrail refusals", "inferflux_guardrail_blocks_total"],
  ["Engine restarts", "inferflux_engine_restarts_total"],
];

const moments = [];
const history = {};

const whole = (value) => Math.round(value).toLocaleString("en");
const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

/** The samples of one moment, summed where a series has several labels. */
class Moment {
  constructor(samples) {
    this.time = performance.now() / 1000;
    this.samples = samples;
  }

  sum(name, fits = () => true) {
    return this.samples.filter((sample) => sample.name === name && fits(sample.labels))
      .reduce((total, sample) => total + sample.value, 0);
  }

  /** Upper bounds of a histogram's buckets with their counts over all models, ascending. */
  buckets(name) {
    const counts = new Map();
    for (const sample of this.samples) {
      if (sample.name !== `${name}_bucket`) continue;
      const bound = sample.labels.le === "+Inf" ? Infinity : Number(sample.labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + sample.value);
    }
    return [...counts].sort(([a], [b]) => a - b);
  }
}

/** The median of what a histogram counted between two moments, interpolated as Prometheus does; null: nothing. */
function median(name, before, now) {
  const old = new Map(before.buckets(name));
  const counts = now.buckets(name).map(([bound, count]) => [bound, count - (old.get(bound) ?? 0)]);
  const total = counts.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  let lower = 0;
  let below = 0;
  for (const [bound, count] of counts) {
    if (count >= total / 2) {
      return bound === Infinity ? lower : lower + (bound - lower) * ((total / 2 - below) / (count - below));
    }
    [lower, below] = [bound, count];
  }
  return null;
}

function tile(name, label, value, shown) {
  const points = (history[name] ??= []);
  points.push(value ?? points.at(-1) ?? 0);
  if (points.length > HISTORY) points.shift();
  const top = Math.max(...points, 1e-9);
  const line = points.map((point, index) => `${100 - ((points.length - 1 - index) * 100) / (HISTORY - 1)},${29 - (28 * point) / top}`).join(" ");
  const namespace = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(namespace, "svg");
  picture.setAttribute("viewBox", "0 0 100 30");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(namespace, "polyline");
  path.setAttribute("points", line);
  picture.append(path);
  return make("div", { className: "tile" }, make("span", {}, label), make("b", {}, shown), picture);
}

function showTiles(now) {
  const last = moments.at(-1);
  const rate = (name) => (last ? Math.max(0, now.sum(name) - last.sum(name)) / (now.time - last.time) : 0);
  const first = moments.length ? median("inferflux_time_to_first_token_seconds", moments[0], now) : null;
  const between = moments.length ? median("inferflux_inter_token_latency_seconds", moments[0], now) : null;
  const made = rate("inferflux_generation_tokens_total");
  byId("tiles").replaceChildren(
    tile("queue", "Waiting", now.sum("inferflux_queue_depth"), whole(now.sum("inferflux_queue_depth"))),
    tile("running", "Running", now.sum("inferflux_running_requests"), whole(now.sum("inferflux_running_requests"))),
    tile("tokens", "Tokens per second", made, made < 10 ? made.toFixed(1) : whole(made)),
    tile("ttft", "Time to first token", first, first === null ? "–" : seconds(first)),
    tile("between", "Between tokens", between, between === null ? "–" : seconds(between)),
    tile("batch", "Tokens per step", now.sum("inferflux_batch_tokens"), whole(now.sum("inferflux_batch_tokens"))),
  );
}

function showTiers(now) {
  byId("tiers").replaceChildren(...TIERS.map((tier) => {
    const ofTier = (labels) => labels.tier === tier;
    const used = now.sum("inferflux_kv_pages_in_use", ofTier);
    const total = now.sum("inferflux_kv_pages_total", ofTier);
    const name = { device: "device", cpu: "CPU", nvme: "NVMe" }[tier];
    return make("div", { className: "tier" },
      make("span", {}, name),
      make("progress", { max: Math.max(total, 1), value: used, ariaLabel: `${name} pages in use` }),
      make("span", {}, total ? `${whole(used)} of ${whole(total)}` : "off"));
  }));
}

function showTotals(now) {
  fillTable(byId("totals"), [], TOTALS.map(([label, name, fits]) => [
    label, make("td", { className: "number" }, whole(now.sum(name, fits))),
  ]));
}

/** Reads the metrics once and shows them. */
export async function refreshLive() {
  let now;
  try {
    now = new Moment(await metrics());
  } catch (error) {
    byId("live-note").textContent = error.status === 404
      ? "Metrics are disabled (server.enable_metrics is false)." : error.message;
    return;
  }
  byId("live-note").textContent = "";
  showTiles(now);
  showTiers(now);
  showTotals(now);
  moments.push(now);
  if (moments.length > WINDOW) moments.shift();
}
