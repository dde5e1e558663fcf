// The page's life: sign in, tabs, what is refreshed when, sign out.

import { call, setKey } from "/ui/api.js";
import {
  clearAdmin, learnRights, refreshGuardrails, refreshKeys, refreshModelTable, startAdmin,
} from "/ui/admin.js";
import { byId, toast } from "/ui/dom.js";
import { refreshLive } from "/ui/live.js";
import { clearConversation, refreshModels, startPlayground } from "/ui/playground.js";

const PERIOD_MS = 2000;

// What a tab loads when it opens, and which of that goes on while it is open.
const SECTIONS = {
  live: { open: refreshLive, again: refreshLive },
  playground: { open: refreshModels, again: refreshModels },
  models: { open: refreshModelTable, again: refreshModelTable },
  guardrails: { open: refreshGuardrails },
  keys: { open: refreshKeys },
};

let shown = "live";
let timer = null;

async function refreshHealth() {
  const health = byId("health");
  try {
    const answer = await call("GET", "/healthz");
    const ready = answer.models.filter((model) => model.state === "ready").length;
    health.className = answer.status;
    health.textContent = `${answer.status}, ${ready} of ${answer.models.length} models ready`;
    byId("version").textContent = answer.version;
  } catch {
    health.className = "degraded";
    health.textContent = "the server does not respond";
  }
}

/** Shows what went wrong; whose key is not taken any more is shown to the door. */
const tell = (error) => (error.status === 401 ? signOut(error.message) : toast(error.message));

async function tick() {
  await refreshHealth();
  const again = SECTIONS[shown].again;
  if (!byId("house").hidden && again && !document.querySelector("dialog[open]")) {
    await again().catch(tell);
  }
  timer = setTimeout(tick, PERIOD_MS);
}

async function show(name) {
  shown = name;
  for (const tab of byId("tabs").children) {
    const chosen = tab.id === `tab-${name}`;
    tab.ariaSelected = String(chosen);
    tab.tabIndex = chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  await SECTIONS[name].open().catch(tell);
}

function startTabs() {
  const tabs = [...byId("tabs").children];
  const nameOf = (tab) => tab.getAttribute("aria-controls");
  for (const tab of tabs) tab.addEventListener("click", () => show(nameOf(tab)));
  byId("tabs").addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -tabs.length, End: tabs.length };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const at = tabs.indexOf(document.activeElement);
    const wrapped = Math.abs(moves[event.key]) === 1
      ? (at + moves[event.key] + tabs.length) % tabs.length
      : Math.max(0, Math.min(tabs.length - 1, at + moves[event.key]));
    tabs[wrapped].focus();
    show(nameOf(tabs[wrapped]));
  });
}

async function signIn(event) {
  event.preventDefault();
  const error = byId("sign-in-error");
  error.textContent = "";
  const key = byId("key").value.trim();
  if (/[^\x20-\x7e]/.test(key)) {
    error.textContent = "a key has ASCII characters only";
    return;
  }
  setKey(key);
  try {
    await call("GET", "/v1/models");
    await learnRights();
  } catch (refused) {
    setKey("");
    error.textContent = refused.message;
    byId("key").select();
    return;
  }
  byId("sign-in").reset();
  byId("door").hidden = true;
  byId("house").hidden = false;
  byId("sign-out").hidden = false;
  await show("live");
  byId("tab-live").focus();
}

/** Leaves nothing behind of what was typed, asked or read. `reason`: why, when nobody asked for it. */
function signOut(reason = "") {
  setKey("");
  clearConversation();
  clearAdmin();
  for (const form of document.forms) form.reset();
  byId("sign-in-error").textContent = reason;
  byId("house").hidden = true;
  byId("sign-out").hidden = true;
  byId("door").hidden = false;
  byId("key").focus();
}

byId("sign-in").addEventListener("submit", signIn);
byId("sign-out").addEventListener("click", () => signOut());
startTabs();
startPlayground();
startAdmin();
tick();
