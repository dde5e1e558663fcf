// Models, guardrails and keys: what an administrator reads and changes.

import { call, send, tagOf } from "/ui/api.js";
import { attempt, button, byId, confirmed, fillTable, make, toast } from "/ui/dom.js";

// What a row of the table of models shows.
const SHOWN = ["id", "state", "error", "default", "stub", "backend", "max_model_len"];
const CHANGED_MEANWHILE = 412;

let isAdmin = false;
let shownModels = "";
// The ETag of the guardrails in the form; none while they could not be read.
let rulesTag = null;

/** Finds out whether the key may administer, and locks the forms where it may not. */
export async function learnRights() {
  try {
    await call("GET", "/v1/admin/guardrails");
    isAdmin = true;
  } catch (error) {
    if (error.status !== 403 && error.status !== 401) throw error;
    isAdmin = false;
  }
  for (const part of document.querySelectorAll(".needs-admin")) {
    part.querySelector(".locked")?.remove();
    for (const control of part.querySelectorAll("input, select, textarea, button")) control.disabled = !isAdmin;
    if (!isAdmin) part.append(make("p", { className: "hint locked" }, "This needs a key with the scope admin."));
  }
}

export async function refreshModelTable() {
  const { data } = await call("GET", isAdmin ? "/v1/admin/models" : "/v1/models");
  // A row that is made anew takes the focus away from its button: only when there is something new.
  const shown = JSON.stringify([isAdmin, data.map((model) => SHOWN.map((name) => model[name]))]);
  if (shown === shownModels) return;
  shownModels = shown;
  fillTable(byId("model-table"), ["Model", "State", "Backend", "Window", ""], data.map((model) => {
    const state = make("span", { className: `badge ${model.state}` }, model.state);
    const name = make("td", {}, model.id);
    if (model.default) name.append(" ", make("span", { className: "badge" }, "default"));
    if (model.stub) name.append(" ", make("span", { className: "badge" }, "demo"));
    if (model.error) name.append(make("p", { className: "error" }, model.error));
    const window = model.max_model_len ? model.max_model_len.toLocaleString("en") : "–";
    return [name, make("td", {}, state), model.backend ?? "–", make("td", { className: "number" }, window), actions(model)];
  }));
}

function actions(model) {
  const cell = make("td", { className: "actions" });
  if (!isAdmin) return cell;
  if (!model.default && model.state === "ready") {
    cell.append(button("Make default", (event) => attempt(event.target, async () => {
      if (!(await confirmed(`Let ${model.id} answer requests that name no model?`, "Make default"))) return;
      await call("PUT", "/v1/admin/models/default", { id: model.id });
      await refreshModelTable();
    })));
  }
  cell.append(button("Unload", (event) => attempt(event.target, async () => {
    const question = `Unload ${model.id}? Running requests will finish; new ones will be refused.`;
    if (!(await confirmed(question, "Unload", { isLoss: true }))) return;
    const { state } = await call("DELETE", "/v1/admin/models", { id: model.id });
    toast(`${model.id} is ${state}`);
    await refreshModelTable();
  })));
  return cell;
}

async function loadModel() {
  const id = byId("load-id").value;
  toast(`${id} is loading`);
  const { state } = await call("POST", "/v1/admin/models", {
    id, path: byId("load-path").value, backend: byId("load-backend").value, default: byId("load-default").checked,
  });
  toast(`${id} is ${state}`);
  byId("load-model").reset();
  await refreshModelTable();
}

export async function refreshGuardrails() {
  if (!isAdmin) return;
  rulesTag = null;
  // What was typed before they are read would be lost under them.
  const fields = [...byId("guardrails-form").elements].filter((field) => field.type !== "submit");
  const setDisabled = (disabled) => fields.forEach((field) => { field.disabled = disabled; });
  setDisabled(true);
  try {
    const response = await send("GET", "/v1/admin/guardrails");
    const rules = await response.json();
    if (!isAdmin) return; // signed out meanwhile
    rulesTag = tagOf(response);
    byId("blocklist").value = rules.blocklist.join("\n");
    byId("opa-endpoint").value = rules.opa_endpoint ?? "";
    byId("on-error").value = rules.on_error;
    byId("check-output").checked = rules.check_output;
  } finally {
    setDisabled(false);
  }
}

async function saveGuardrails() {
  if (!rulesTag) throw new Error("The current guardrails could not be read: open this tab again first.");
  const terms = byId("blocklist").value.split("\n").map((term) => term.trim()).filter(Boolean);
  const question = `Apply these guardrails now, with ${terms.length} blocked terms?`;
  if (!(await confirmed(question, "Save"))) return;
  try {
    await send("PUT", "/v1/admin/guardrails", {
      blocklist: terms,
      opa_endpoint: byId("opa-endpoint").value || null,
      on_error: byId("on-error").value,
      check_output: byId("check-output").checked,
    }, { tag: rulesTag });
  } catch (error) {
    if (error.status !== CHANGED_MEANWHILE) throw error;
    await offerTheirs();
    return;
  }
  toast("The guardrails have been applied.");
  await refreshGuardrails();
}

/** Tells of somebody else's change. What was typed here stays until its author says otherwise. */
async function offerTheirs() {
  const question = "Nothing was saved: somebody else has changed the guardrails since you opened them. "
    + "Discard your edits and load theirs?";
  if (await confirmed(question, "Load theirs", { isLoss: true })) await refreshGuardrails();
}

export async function refreshKeys() {
  if (!isAdmin) return;
  const { data } = await call("GET", "/v1/admin/api_keys");
  if (!isAdmin) return; // signed out meanwhile
  fillTable(byId("key-table"), ["Name", "Begins with", "Tenant", "Scopes", ""], data.map((one) => {
    const revoke = button("Revoke", (event) => attempt(event.target, async () => {
      if (!(await confirmed(`Revoke the key ${one.name} (${one.id})? It will be refused immediately.`, "Revoke", { isLoss: true }))) return;
      await call("DELETE", "/v1/admin/api_keys", { id: one.id });
      await refreshKeys();
    }));
    return [one.name, make("td", {}, make("code", {}, one.prefix ? `${one.prefix}…` : "–")), one.tenant,
      one.scopes.join(", "), make("td", { className: "actions" }, revoke)];
  }));
}

async function makeKey() {
  const scopes = [...document.querySelectorAll("input[name=scope]:checked")].map((box) => box.value);
  const made = await call("POST", "/v1/admin/api_keys", { name: byId("key-name").value, scopes });
  byId("new-key").reset();
  byId("made-key").replaceChildren(make("code", {}, made.key), " (shown only once)");
  await refreshKeys();
}

/** Forgets what a signed-out operator must not leave on the page. */
export function clearAdmin() {
  isAdmin = false;
  shownModels = "";
  rulesTag = null;
  for (const id of ["made-key", "key-table", "model-table"]) byId(id).replaceChildren();
}

export function startAdmin() {
  const forms = { "load-model": loadModel, "guardrails-form": saveGuardrails, "new-key": makeKey };
  for (const [id, action] of Object.entries(forms)) {
    byId(id).addEventListener("submit", (event) => {
      event.preventDefault();
      attempt(event.submitter, action);
    });
  }
}
