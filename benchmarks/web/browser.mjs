// Runs jobs in headless Chromium: node browser.mjs JOBS.json RESULTS.json
// A job: {"name", "do": "compare" | "time" | "usage", ...}, see page.mjs. `usage` runs the JavaScript of a folder's usage.md as
// it is written there, from a page in that folder. What was done before is not done again.
import { createServer } from "node:http";
import { existsSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const ROOT = dirname(fileURLToPath(import.meta.url));
const MIME = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

function serve(request, response) {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  let file = join(ROOT, path);
  if (path.endsWith("/page.html")) file = join(ROOT, "page.html"); // in every folder
  let body;
  if (path.endsWith("/usage.mjs")) {
    const usage = readFileSync(join(dirname(file), "usage.md"), "utf8");
    const code = usage.match(/```javascript\n([^]*?)```/)[1];
    body = `${code}\nexport { results };\n`;
  } else if (statSync(file, { throwIfNoEntry: false })?.isFile()) body = readFileSync(file);
  // isolation gives the page a fine clock
  response.writeHead(body === undefined ? 404 : 200, {
    "Content-Type": MIME[extname(file)] ?? "application/octet-stream",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
  });
  response.end(body);
}

async function run(browser, origin, job) {
  const page = await browser.newPage();
  try {
    await page.goto([origin, job.folder, "page.html"].filter(Boolean).join("/"));
    if (job.do === "usage") {
      return await page.evaluate(async () => {
        const { results } = await import(new URL("usage.mjs", location));
        return Object.fromEntries(Object.entries(results).map(([name, one]) => [name, { type: one.type, dims: one.dims }]));
      });
    }
    return await page.evaluate(async (job) => (await import("/page.mjs"))[job.do](job), job);
  } finally {
    await page.close();
  }
}

const [jobsFile, resultsFile] = process.argv.slice(2);
const jobs = JSON.parse(readFileSync(jobsFile, "utf8"));
const results = existsSync(resultsFile) ? JSON.parse(readFileSync(resultsFile, "utf8")) : {};
const server = createServer(serve).listen(0, "localhost");
await new Promise((resolve) => server.on("listening", resolve));
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", headless: true, args: FLAGS });
results.chromium = browser.version();
try {
  for (const job of jobs) {
    if (job.name in results && !results[job.name].error) continue;
    process.stderr.write(`${job.name}\n`);
    try {
      results[job.name] = await run(browser, `http://localhost:${server.address().port}`, job);
    } catch (error) {
      results[job.name] = { error: String(error.message ?? error).split("\n").slice(0, 3).join(" ") };
    }
    writeFileSync(resultsFile, JSON.stringify(results, null, 1));
  }
} finally {
  await browser.close();
  server.close();
}
