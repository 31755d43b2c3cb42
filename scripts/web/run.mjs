// Run ONNX files by onnxruntime-web, in Node or in headless Chromium: node scripts/web/run.mjs MODULES node|BROWSER < spec.json
//
// MODULES is a node_modules folder with onnxruntime-web (and playwright-core for a browser); BROWSER is Chromium's program. The spec
// and the answer, JSON on standard output, are those of cases.mjs; files in the spec are paths.
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join, normalize, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const UNPACK = resolve(HERE, "../../torchopt/web");
const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".html": "text/html" };
const [modules, where] = [resolve(process.argv[2]), process.argv[3]];

async function inNode(spec) {
  const ort = createRequire(join(modules, "x.js"))("onnxruntime-web");
  const [{ runCases }, { unpack }] = [await import(join(HERE, "cases.mjs")), await import(join(UNPACK, "unpack.mjs"))];
  return runCases(ort, unpack, spec, readFile);
}

/** Serve the package's dist folder, our two scripts, and the spec's files; nothing else. */
async function serve(files) {
  const folders = { ort: join(modules, "onnxruntime-web/dist"), web: HERE, torchopt: UNPACK };
  const server = createServer(async (request, response) => {
    const [, first, ...rest] = decodeURIComponent(new URL(request.url, "http://localhost").pathname).split("/");
    const path = first === "file" ? files[Number(rest[0])] : folders[first] && normalize(join(folders[first], rest.join("/")));
    const inside = first === "file" || path?.startsWith(folders[first]);
    const data = first === "" ? "<!doctype html><title>torchopt</title>" : inside && (await readFile(path).catch(() => null));
    response.writeHead(data ? 200 : 404, { "Content-Type": first === "" ? "text/html" : (TYPES[extname(path ?? "")] ?? "application/octet-stream") });
    response.end(data || "");
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  return server;
}

async function inBrowser(spec) {
  const { chromium } = createRequire(join(modules, "x.js"))("playwright-core");
  const files = Object.values(spec.cases).map((chosen) => chosen.file);
  const server = await serve(files);
  const cases = Object.fromEntries(Object.entries(spec.cases).map(([name, chosen], i) => [name, { ...chosen, file: `/file/${i}` }]));
  const browser = await chromium.launch({ executablePath: where, args: ["--no-sandbox"] });
  try {
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    return await page.evaluate(async (given) => {
      const [ort, { runCases }, { unpack }] = [await import("/ort/ort.wasm.min.mjs"), await import("/web/cases.mjs"), await import("/torchopt/unpack.mjs")];
      ort.env.wasm.wasmPaths = "/ort/";
      return runCases(ort, unpack, given, async (file) => (await fetch(file)).arrayBuffer());
    }, { ...spec, cases }); // prettier-ignore
  } finally {
    await browser.close();
    server.close();
  }
}

let text = "";
for await (const piece of process.stdin) text += piece;
const spec = JSON.parse(text);
const answer = where === "node" ? await inNode(spec) : await inBrowser(spec);
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
