// Milliseconds of one run of an ONNX model in WASM, in node, whose engine is Chromium's; for --latency-cmd:
//
//   (cd benchmarks/web && npm install)
//   compress model.pt2 --target web --passes fold,int8 --latency-cmd 'node benchmarks/web/latency.mjs {onnx}'
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web/wasm";

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";
const session = await ort.InferenceSession.create(readFileSync(process.argv[2]));
const ARRAYS = { float32: Float32Array, uint8: Uint8Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array };
const feeds = {};
for (const { name, type, shape } of session.inputMetadata) {
  // axes that are free: one sample, 16 of anything else
  const dims = shape.map((size, i) => (typeof size === "number" && size > 0 ? size : i ? 16 : 1));
  const count = dims.reduce((a, b) => a * b, 1);
  const one = type === "int64" ? 1n : 1;
  feeds[name] = new ort.Tensor(type, new ARRAYS[type](count).fill(one), dims);
}
const times = [];
for (const end = performance.now() + 2000; performance.now() < end || times.length < 9; ) {
  const start = performance.now();
  await session.run(feeds);
  times.push(performance.now() - start);
}
console.log(times.sort((a, b) => a - b)[times.length >> 1]);
