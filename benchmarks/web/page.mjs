// Runs in the page: models on samples, and models against each other by time.
import * as ort from "onnxruntime-web/wasm";

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

// numbers of ONNX's types -> how JavaScript says and holds them
const TYPES = {
  1: ["float32", Float32Array],
  2: ["uint8", Uint8Array],
  3: ["int8", Int8Array],
  5: ["int16", Int16Array],
  6: ["int32", Int32Array],
  7: ["int64", BigInt64Array],
  9: ["bool", Uint8Array],
  10: ["float16", Uint16Array],
  11: ["float64", Float64Array],
};

async function bytes(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

// Name and tensor of a TensorProto as the files of test_data_set_0/ hold it: dims, type, name and raw bytes.
function parsed(file) {
  const dims = [];
  let [at, type, name, raw] = [0, 0, "", new Uint8Array()];
  const number = () => {
    for (let value = 0, factor = 1; ; factor *= 128) {
      const byte = file[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < file.length) {
    const key = number();
    const value = number();
    if ((key & 7) === 2) {
      const part = file.slice(at, at + value);
      at += value;
      if (key >> 3 === 8) name = new TextDecoder().decode(part);
      if (key >> 3 === 9) raw = part;
    } else if (key >> 3 === 1) dims.push(value);
    else if (key >> 3 === 2) type = value;
  }
  const [said, held] = TYPES[type];
  return [name, new ort.Tensor(said, new held(raw.buffer), dims)];
}

// Inputs and expected outputs of one sample, by name. counts: how many of each.
async function sample(folder, counts) {
  const found = {};
  for (const kind of ["input", "output"]) {
    const files = Array.from({ length: counts[kind] }, (_, i) => bytes(`${folder}/${kind}_${i}.pb`));
    found[kind] = Object.fromEntries((await Promise.all(files)).map(parsed));
  }
  return found;
}

// A model on samples: for each output noise, signal and the largest difference to what was expected.
export async function compare({ model, samples, counts, options }) {
  const session = await ort.InferenceSession.create(model, options ?? {});
  const found = {};
  for (const folder of samples) {
    const { input, output } = await sample(folder, counts);
    const results = await session.run(input);
    for (const [name, expected] of Object.entries(output)) {
      const seen = results[name];
      if (String(seen.dims) !== String(expected.dims)) throw new Error(`${name} is ${seen.dims}, not ${expected.dims}`);
      const one = (found[name] ??= { noise: 0, signal: 0, difference: 0, largest: 0, finite: true });
      for (let i = 0; i < expected.data.length; i++) {
        const [a, b] = [Number(expected.data[i]), Number(seen.data[i])];
        one.noise += (a - b) ** 2;
        one.signal += a ** 2;
        one.difference = Math.max(one.difference, Math.abs(a - b));
        one.largest = Math.max(one.largest, Math.abs(a));
        one.finite &&= Number.isFinite(b);
      }
    }
  }
  await session.release();
  return found;
}

const middle = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];

// Median milliseconds of models on one sample, in turns, and the median and quartiles of the first one's time over each.
export async function time({ models, sample: folder, counts, seconds }) {
  const { input } = await sample(folder, counts);
  const sessions = [];
  for (const model of models) sessions.push(await ort.InferenceSession.create(model));
  const measured = async (session, runs) => {
    const start = performance.now();
    for (let i = 0; i < runs; i++) await session.run(input);
    return (performance.now() - start) / runs;
  };
  const runs = [];
  for (const session of sessions) {
    await measured(session, 3);
    runs.push(Math.max(1, Math.ceil(5 / (await measured(session, 3)))));
  }
  const rounds = [];
  for (const end = performance.now() + seconds * 1000; performance.now() < end || rounds.length < 9; ) {
    const round = [];
    for (const [i, session] of sessions.entries()) round.push(await measured(session, runs[i]));
    rounds.push(round);
  }
  for (const session of sessions) await session.release();
  return sessions.map((_, i) => {
    const ratios = rounds.map((round) => round[0] / round[i]).sort((a, b) => a - b);
    const at = (part) => ratios[Math.floor(part * (ratios.length - 1))];
    return { ms: middle(rounds.map((round) => round[i])), ratio: at(0.5), low: at(0.25), high: at(0.75), rounds: rounds.length };
  });
}
