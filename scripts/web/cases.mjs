// What is run in Node and in the browser alike: sessions of ONNX files by onnxruntime-web, timed in turn, and their outputs.

/**
 * @param ort the module onnxruntime-web
 * @param unpack torchopt/web/unpack.mjs's function
 * @param spec {cases: {name: {file, unpack}}, feeds: {name: {type, dims, data: base64}}, loads, repeats, keep: also give the bytes}
 * @param read file → Promise of its bytes
 * @returns {name: {load_ms: [...], unpack_ms: [...], latency_ms: [...], outputs: {name: {dims, data}}, bytes}}
 */
export async function runCases(ort, unpack, spec, read) {
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const feeds = Object.fromEntries(Object.entries(spec.feeds).map(([name, feed]) => [name, tensor(ort, feed)]));
  const [results, sessions] = [{}, {}];
  for (const name of Object.keys(spec.cases)) results[name] = { unpack_ms: [], load_ms: [], latency_ms: [] };
  for (let round = 0; round < (spec.loads ?? 1); round++) {
    for (const [name, chosen] of Object.entries(spec.cases)) {
      const bytes = await read(chosen.file);
      const start = performance.now();
      const model = chosen.unpack ? unpack(bytes) : bytes;
      const unpacked = performance.now();
      await sessions[name]?.release();
      const made = performance.now();
      sessions[name] = await ort.InferenceSession.create(model);
      results[name].load_ms.push(performance.now() - made);
      results[name].unpack_ms.push(unpacked - start);
      if (spec.keep) results[name].bytes = base64(model);
    }
  }
  for (let round = -3; round < (spec.repeats ?? 1); round++) {
    for (const [name, session] of Object.entries(sessions)) {
      const start = performance.now();
      const outputs = await session.run(feeds);
      if (round >= 0) results[name].latency_ms.push(performance.now() - start);
      results[name].outputs = Object.fromEntries(Object.entries(outputs).map(([key, t]) => [key, { dims: t.dims, data: base64(t.data) }]));
    }
  }
  return results;
}

function tensor(ort, feed) {
  const bytes = Uint8Array.from(atob(feed.data), (letter) => letter.charCodeAt(0));
  const type = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array }[feed.type];
  return new ort.Tensor(feed.type, new type(bytes.buffer), feed.dims);
}

function base64(array) {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  let letters = "";
  for (let i = 0; i < bytes.length; i += 32768) letters += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(letters);
}
