// The chat playground: streams an answer, can be stopped, and shows what else each token could have been.

import { call, events } from "/ui/api.js";
import { byId, make } from "/ui/dom.js";

const TOP = 5;
// As near to the end counts as being there.
const NEAR_PX = 24;

// What the model is sent. A new conversation is a new list: an answer that still comes belongs to the old one.
let messages = [];
let running = null;

export async function refreshModels() {
  const select = byId("chat-model");
  const chosen = select.value;
  const { data } = await call("GET", "/v1/models");
  const usable = data.filter((model) => model.state === "ready" || model.state === "unloaded");
  const same = usable.map((model) => model.id).join() === [...select.options].map((option) => option.value).join();
  if (same) return;
  select.replaceChildren(...usable.map((model) => make("option", { value: model.id, defaultSelected: model.default }, model.id)));
  const standard = usable.find((model) => model.id === chosen) ?? usable.find((model) => model.default);
  if (standard) select.value = standard.id;
}

function turn(who, text = "") {
  const box = make("div", { className: "turn" }, make("b", {}, who));
  const body = make("span", {}, text);
  box.append(body);
  byId("transcript").append(box);
  box.scrollIntoView({ block: "end" });
  heightSeen = 0;
  return { box, body };
}

/** Returns an event's text as [text, tokens] pieces, one for each token where the tokens' texts are the text's own: a
 * fast model, or a slow page, has many in one event. Else (a character of several tokens, text that is held back) all
 * are one piece. What a token adds nothing to (the end) is its neighbour's. */
function piecesOf(text, entries) {
  const pieces = [];
  let at = 0;
  for (const entry of entries) {
    if (at < text.length && entry.token && text.startsWith(entry.token, at)) {
      pieces.push([entry.token, [entry]]);
      at += entry.token.length;
    } else if (at === text.length && pieces.length) {
      pieces.at(-1)[1].push(entry);
    } else {
      return [[text, entries]];
    }
  }
  return at === text.length ? pieces : [[text, entries]];
}

/** One piece of the answer's text with the tokens it is made of. Only one token at a time is a stop of the Tab key. */
function token(text, entries, isThought) {
  const span = make("span", { className: `token${isThought ? " thought" : ""}`, tabIndex: -1 }, text);
  span.entries = entries;
  return span;
}

function showCard(span) {
  const card = byId("token-card");
  const rows = span.entries.flatMap((entry) => {
    const others = entry.top_logprobs.filter((other) => other.token !== entry.token);
    return [entry, ...others].slice(0, TOP + 1).map((one) => make("tr", { className: one === entry ? "chosen" : "" },
      make("td", {}, make("code", {}, JSON.stringify(one.token))),
      make("td", {}, `${(100 * Math.exp(one.logprob)).toFixed(1)} %`)));
  });
  card.replaceChildren(make("table", {}, ...rows));
  card.hidden = false;
  const at = span.getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - card.offsetWidth - 8);
  const below = at.bottom + 6 + card.offsetHeight < innerHeight;
  card.style.left = `${Math.max(8, left)}px`;
  card.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - card.offsetHeight - 6)}px`;
}

let following = false;
// Where the end was when it was last looked at: who reads further up than that is left there.
let heightSeen = 0;

/** Keeps whoever is at the end there, once a frame: to know where it is, the browser lays the whole answer out. */
function follow() {
  if (following) return;
  following = true;
  requestAnimationFrame(() => {
    following = false;
    const transcript = byId("transcript");
    const height = transcript.scrollHeight;
    const bottom = transcript.scrollTop + transcript.clientHeight;
    if (bottom >= Math.min(heightSeen, height) - NEAR_PX) transcript.scrollTop = height;
    heightSeen = height;
  });
}

function hideCard() {
  byId("token-card").hidden = true;
}

function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hideCard();
  if (!step || !event.target.classList.contains("token")) return;
  const tokens = [...byId("transcript").querySelectorAll(".token")];
  const next = tokens[tokens.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function conversation() {
  const system = byId("chat-system").value.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** Streams the answer to the last message and returns its text. `say` tells how it goes. */
async function answer(signal, say) {
  const { box, body } = turn(byId("chat-model").value);
  const request = {
    model: byId("chat-model").value,
    messages: conversation(),
    temperature: Number(byId("chat-temperature").value),
    max_completion_tokens: Number(byId("chat-tokens").value) || undefined,
    logprobs: true,
    top_logprobs: TOP,
  };
  let text = "";
  let reason = null;
  let count = 0;
  const started = performance.now();
  try {
    for await (const event of events("/v1/chat/completions", request, signal)) {
      const choice = event.choices[0];
      if (!choice) continue;
      const entries = choice.logprobs?.content ?? [];
      // Thoughts and answer may come in one event, where the last thought ends or the page was slow to read.
      const piece = (choice.delta.reasoning_content ?? "") + (choice.delta.content ?? "");
      count += entries.length;
      reason = choice.finish_reason ?? reason;
      if (!piece) continue;
      if (choice.delta.content) text += choice.delta.content;
      const isThought = !choice.delta.content;
      body.append(...(entries.length
        ? piecesOf(piece, entries).map(([part, tokens]) => token(part, tokens, isThought))
        : [make("span", { className: isThought ? "thought" : "" }, piece)]));
      follow();
      say(`${count} tokens`);
    }
    const rate = count / ((performance.now() - started) / 1000);
    say(`${count} tokens, ${rate.toFixed(1)} per second, ended by ${reason ?? "the server"}`);
  } catch (error) {
    if (error.name === "AbortError") {
      say(`stopped after ${count} tokens`);
    } else {
      box.classList.add("failed");
      body.append(`${text ? "\n" : ""}${error.message}`);
      follow();
      say("");
    }
  }
  const first = body.querySelector(".token");
  if (first) first.tabIndex = 0;
  return text;
}

async function ask(event) {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || running) return;
  if (!byId("chat-model").value) {
    byId("chat-status").textContent = "no model is ready";
    return;
  }
  byId("question").value = "";
  for (const old of byId("transcript").querySelectorAll(".token[tabindex='0']")) old.tabIndex = -1;
  const mine = messages;
  mine.push({ role: "user", content: question });
  turn("you", question);
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  const text = await answer(running.signal, (status) => {
    if (mine === messages) byId("chat-status").textContent = status;
  });
  // A question that got no answer is not sent again: what was refused once would be refused with every later one.
  if (text) mine.push({ role: "assistant", content: text });
  else mine.pop();
  running = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
  byId("question").focus();
}

/** Forgets the conversation; called when signing out, too. */
export function clearConversation() {
  running?.abort();
  messages = [];
  byId("transcript").replaceChildren();
  byId("chat-status").textContent = "";
}

export function startPlayground() {
  byId("ask").addEventListener("submit", ask);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", clearConversation);
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) byId("ask").requestSubmit();
    if (event.key === "Enter" && !event.shiftKey) event.preventDefault();
  });
  const transcript = byId("transcript");
  for (const [come, go] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    transcript.addEventListener(come, (event) => event.target.entries && showCard(event.target));
    transcript.addEventListener(go, hideCard);
  }
  transcript.addEventListener("keydown", walk);
}
