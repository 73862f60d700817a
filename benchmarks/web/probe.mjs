// Loads FOLDER/FIRST.onnx and so on up to LAST; one line of JSON for each, "" where it loads.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web/wasm";

const [folder, first, last] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";
for (let i = Number(first); i < Number(last); i++) {
  let said = "";
  try {
    const session = await ort.InferenceSession.create(readFileSync(`${folder}/${i}.onnx`), {
      graphOptimizationLevel: "disabled",
      logSeverityLevel: 4,
    });
    await session.release();
  } catch (error) {
    said = String(error.message ?? error);
  }
  process.stdout.write(`${JSON.stringify(said)}\n`);
}
