// Small helpers around the document. Text always goes in as text, never as HTML.

export const byId = (id) => document.getElementById(id);

/** Returns a new element. `props` are set as properties; children are elements or texts. */
export function make(tag, props = {}, ...children) {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
}

/** Fills a table: `heads` are texts, each row a list of cells (text or element). A narrow page shows heads in the cells,
 * and a column of numbers has its head at the numbers' side. */
export function fillTable(table, heads, rows) {
  const cell = (content, column) => {
    const element = content instanceof HTMLTableCellElement ? content : make("td", {}, content ?? "");
    if (heads[column]) element.dataset.head = heads[column];
    return element;
  };
  const kind = (column) => (rows[0]?.[column]?.className === "number" ? "number" : "");
  const parts = [];
  if (heads.length) {
    const cells = heads.map((head, column) => (head ? make("th", { scope: "col", className: kind(column) }, head) : make("td")));
    parts.push(make("thead", {}, make("tr", {}, ...cells)));
  }
  parts.push(make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell)))));
  table.replaceChildren(...parts);
}

export function button(label, onClick) {
  const element = make("button", { type: "button" }, label);
  element.addEventListener("click", onClick);
  return element;
}

let toastTimer;

/** Says something for a few seconds, to screen readers too; they hear once what is said again and again. */
export function toast(message) {
  const box = byId("toast");
  if (box.hidden || box.textContent !== message) box.textContent = message;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { box.hidden = true; }, 6000);
}

/** Asks before something that others will notice; resolves to true when the answer is yes. `isLoss`: it takes something
 * away. */
export function confirmed(question, yes, { isLoss = false } = {}) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = question;
  byId("confirm-yes").textContent = yes;
  byId("confirm-yes").className = isLoss ? "danger" : "";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Runs an action of a form or button; what goes wrong is shown, and the control rests meanwhile. A control that rests
 * loses the focus, and gets it back unless it has gone elsewhere. */
export async function attempt(control, action) {
  const focused = control !== null && control === document.activeElement;
  if (control) control.disabled = true;
  try {
    await action();
  } catch (error) {
    toast(error.message);
  } finally {
    if (control) control.disabled = false;
    // Nobody has it: the body, or the button of a dialog that has been closed.
    if (focused && document.activeElement.offsetParent === null) control.focus();
  }
}
