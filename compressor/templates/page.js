"use strict";
const columns = document.querySelectorAll("th button");
const search = document.querySelector("#search");
const copy = document.querySelector("#copy");

function value(row, column) {
  const cell = row.cells[column];
  if (!("v" in cell.dataset)) return cell.textContent.trim();
  return cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
}

function compare(a, b, down) {
  if (typeof a === "string") return down ? b.localeCompare(a) : a.localeCompare(b);
  if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b); // what is not known stands last, whichever way
  return a === b ? 0 : (a < b) === down ? 1 : -1;
}

for (const button of columns) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const down = head.ariaSort ? head.ariaSort === "ascending" : head.classList.contains("down");
    for (const other of head.parentElement.cells) other.ariaSort = null;
    head.ariaSort = down ? "descending" : "ascending";
    const rows = [...body.rows];
    rows.sort((a, b) => compare(value(a, head.cellIndex), value(b, head.cellIndex), down));
    body.append(...rows);
  });
}

if (search) {
  const rows = [...document.querySelector("#layers").tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
    document.querySelector("#found").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  search.addEventListener("input", filter);
  search.parentElement.hidden = false;
  filter();
}

if (copy) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    const command = document.querySelector("#command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      copy.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(command); // the browser does not allow it: ready for Ctrl-C
    }
  });
}
