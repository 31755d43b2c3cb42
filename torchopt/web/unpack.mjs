// Unpack: a packed ONNX file to the dense one, in a browser or in Node, before a session is made of it. No dependencies.
//
//     import { unpack } from "./unpack.mjs";
//     const session = await ort.InferenceSession.create(unpack(await (await fetch("model.onnx")).arrayBuffer()));
//
// A packed weight is a node of domain "torchopt" (torchopt/pack/decoder_calls.py): its operator names the codec, its inputs are the codes,
// the positions and the table. Each is decoded here as torchopt/packing/codec.py does it and becomes an ordinary initializer; the
// tensors are bit-equal to those of the dense file. A damaged file raises an Error that names the weight, and allocates little.
// Weights in branches, bodies of loops and functions stay packed, with the functions that decode them: the runtime does it.

const DOMAIN = "torchopt";
const MODEL = { opset: 8, graph: 7, functions: 25 }; // field numbers of onnx.proto
const GRAPH = { node: 1, initializer: 5, output: 12 };
const FUNCTION = { node: 7 };
const NODE = { input: 1, output: 2, type: 4, attribute: 5, domain: 7 };
const ATTRIBUTE = { name: 1, graph: 6, ints: 8, graphs: 11 };
const TENSOR = { dims: 1, type: 2, name: 8, raw: 9, location: 14 };
const ARRAYS = {
  ...{ 1: Uint32Array, 2: Uint8Array, 3: Uint8Array, 6: Uint32Array }, // the bits of float, uint8, int8, int32, uint16,
  ...{ 4: Uint16Array, 10: Uint16Array, 11: BigUint64Array }, // float16, double
};
const [UINT4, UINT8] = [21, 2];
const [CUT, LANE] = ["v", 512]; // the operator that cuts a tensor out of codes; symbols of a lane of Huffman codes
const CONSTANT_AT_MOST = 1 << 20; // bytes of a constant tensor kept as one value
const text = new TextDecoder();

/**
 * Return the dense form of an ONNX file; a file without packed weights comes back as it is.
 * @param {ArrayBuffer | Uint8Array} packed the bytes of the file
 * @returns {Uint8Array} bytes that ort.InferenceSession.create takes
 */
export function unpack(packed) {
  const bytes = view(packed);
  const model = fields(bytes);
  const calls = model.filter((f) => f.number === MODEL.graph).flatMap((f) => fields(f.body).filter(isCall));
  if (calls.length === 0) return bytes;
  const ours = (f) => (f.number === MODEL.opset && string(f.body, 1) === DOMAIN) || (f.number === MODEL.functions && string(f.body, 10) === DOMAIN);
  const kept = callsElsewhere(model) ? model : model.filter((f) => !ours(f));
  return joined(kept.flatMap((f) => (f.number === MODEL.graph ? message(MODEL.graph, denseGraph(f.body)) : [f.whole])));
}

/** Whether an ONNX file has packed weights. */
export function isPacked(packed) {
  const bytes = view(packed);
  return fields(bytes).some((f) => f.number === MODEL.graph && fields(f.body).some(isCall));
}

/** Plain bytes: the slices of a Node Buffer would be views. */
function view(packed) {
  return ArrayBuffer.isView(packed) ? new Uint8Array(packed.buffer, packed.byteOffset, packed.byteLength) : new Uint8Array(packed);
}

function isCall(field) {
  return field.number === GRAPH.node && field.body !== null && string(field.body, NODE.domain) === DOMAIN;
}

/** Whether subgraphs or functions, which stay as they are, hold packed weights. */
function callsElsewhere(model) {
  const functions = model.filter((f) => f.number === MODEL.functions && string(f.body, 10) !== DOMAIN);
  const bodies = functions.flatMap((f) => fields(f.body).filter((n) => n.number === FUNCTION.node));
  const nodes = model.filter((f) => f.number === MODEL.graph).flatMap((f) => fields(f.body).filter((n) => n.number === GRAPH.node));
  return bodies.some((n) => string(n.body, NODE.domain) === DOMAIN) || [...bodies, ...nodes].some(callsWithin);
}

/** Whether the subgraphs of a node hold packed weights. */
function callsWithin(node) {
  const attributes = fields(node.body).filter((f) => f.number === NODE.attribute);
  const inner = attributes.flatMap((f) => fields(f.body).filter((g) => g.body && (g.number === ATTRIBUTE.graph || g.number === ATTRIBUTE.graphs)));
  const nodes = inner.flatMap((f) => fields(f.body).filter((n) => n.number === GRAPH.node));
  return nodes.some((n) => isCall(n) || callsWithin(n));
}

/** The pieces of a graph with each call of a decoder replaced by the tensor that it stands for. */
function denseGraph(body) {
  const all = fields(body);
  const tensors = new Map();
  for (const f of all) if (f.number === GRAPH.initializer) tensors.set(string(f.body, TENSOR.name), f);
  const calls = all.filter(isCall);
  const codes = codesByName(calls, tensors);
  const weights = calls.filter((f) => !codes.has(string(f.body, NODE.output)));
  const dense = weights.flatMap((f) => message(GRAPH.initializer, decodedTensor(f.body, tensors, codes)));
  const rest = all.filter((f) => !isCall(f));
  const parts = new Set(calls.flatMap((f) => strings(f.body, NODE.input)));
  for (const name of namesRead(rest)) parts.delete(name);
  const kept = rest.filter((f) => f.number !== GRAPH.initializer || !parts.has(string(f.body, TENSOR.name)));
  return [...kept.map((f) => f.whole), ...dense];
}

/** Every name that nodes, subgraphs and outputs of a graph read. */
function namesRead(graph) {
  const names = graph.filter((f) => f.number === GRAPH.output).map((f) => string(f.body, 1));
  for (const node of graph.filter((f) => f.number === GRAPH.node)) {
    names.push(...strings(node.body, NODE.input));
    for (const attribute of fields(node.body).filter((f) => f.number === NODE.attribute)) {
      const inner = fields(attribute.body).filter((f) => f.body && (f.number === ATTRIBUTE.graph || f.number === ATTRIBUTE.graphs));
      for (const f of inner) for (const name of namesRead(fields(f.body))) names.push(name);
    }
  }
  return names;
}

/** What gives the codes that several tensors are cut out of, by name: each is decoded once, when the first tensor asks for it. */
function codesByName(calls, tensors) {
  const cut = calls.filter((f) => string(f.body, NODE.type) === CUT);
  const names = new Set(cut.map((f) => strings(f.body, NODE.input)[0]));
  return new Map(calls.filter((f) => names.has(string(f.body, NODE.output))).map((f) => {
    let found = null;
    return [string(f.body, NODE.output), () => (found ??= codesOf(f.body, tensors))];
  }));
}

/** All codes that a call gives. */
function codesOf(node, tensors) {
  const joined = /^H([0-5])(?:g([2-6]))?$/.exec(string(node, NODE.type));
  if (!joined) {
    const { flat, table } = whole(node, tensors);
    if (table.type !== UINT8) throw new Error(`codes of type ${table.type}`);
    return flat;
  }
  const [low, gapBits] = [Number(joined[1]), Number(joined[2] ?? 0)];
  const inputs = strings(node, NODE.input).map((input) => tensor(tensors.get(input)));
  const { d: [count], b: [base], c, p, q } = attributes(node); // prettier-ignore
  const where = gapBits ? huffman(inputs.splice(0, 4), c[0], p[0]) : null;
  const codes = huffman(inputs.splice(0, 4), base, gapBits ? q[0] : count);
  if (low) {
    const plain = symbols(inputs, low);
    if (plain.length < codes.length) throw new Error(`low bits of ${plain.length} codes for ${codes.length}`);
    for (let i = 0; i < codes.length; i++) codes[i] = (codes[i] << low) | plain[i];
  }
  if (!where) return codes;
  const places = gapPlaces(where, gapBits, count);
  if (places.length !== codes.length) throw new Error(`${codes.length} codes for ${places.length} nonzeros`);
  const out = new Uint8Array(count);
  for (let i = 0; i < places.length; i++) out[places[i]] = codes[i];
  return out;
}

/** The symbols of a stream of Huffman codes (torchopt/codecs/huffman.py). */
function huffman([data, lanes, order, free], base, count) {
  if (order.raw.length !== free.raw.length) throw new Error(`${order.raw.length} codes of ${free.raw.length} lengths`);
  if (lanes.array.length !== Math.ceil(count / LANE) || data.raw.length < 3 || count > 8 * data.raw.length) throw new Error(`${lanes.array.length} lanes for ${count} symbols`);
  const [symbolOf, lengthOf] = [new Uint8Array(256), new Uint8Array(256)];
  let end = 0;
  order.raw.forEach((symbol, i) => {
    const slots = free.raw[i] < 8 ? 2 ** free.raw[i] : 512;
    symbolOf.fill(symbol, end, end + slots);
    lengthOf.fill(8 - free.raw[i], end, (end += slots));
  });
  if (end !== 256) throw new Error("lengths that are no whole code");
  const [bytes, out, last] = [data.raw, new Uint8Array(count), 8 * (data.raw.length - 1) - 1];
  for (let lane = 0, at = 0, i = 0, start = 0; i < count; lane++, start += lanes.array[lane - 1] + base) {
    if (lane && at !== start) throw new Error("a lane does not end where the next one begins");
    for (const stop = Math.min(count, i + LANE); i < stop; i++) {
      if (at > last) throw new Error(`a code at bit ${at} of ${last + 1}`);
      const window = (((bytes[at >> 3] << 8) | bytes[(at >> 3) + 1]) >> (8 - (at & 7))) & 255;
      out[i] = symbolOf[window];
      at += lengthOf[window];
    }
  }
  return out;
}

/** The pieces of the TensorProto that a call stands for. */
function decodedTensor(node, tensors, codes) {
  const name = string(node, NODE.output);
  try {
    const { flat, table, sizes } = string(node, NODE.type) === CUT ? cutOut(node, tensors, codes) : whole(node, tensors);
    const raw = new Uint8Array(flat.buffer, flat.byteOffset, flat.byteLength);
    return [...sizes.d.flatMap((size) => [tag(TENSOR.dims, 0), varint(size)]), tag(TENSOR.type, 0), varint(table.type),
      ...message(TENSOR.name, [new TextEncoder().encode(name)]), ...message(TENSOR.raw, [raw])]; // prettier-ignore
  } catch (error) {
    throw new Error(`unpack: the packed weight ${name} is damaged (${error.message})`);
  }
}

/** A tensor whose codes lie among those of others. */
function cutOut(node, tensors, codes) {
  const [from, name] = strings(node, NODE.input);
  const [sizes, table, all] = [attributes(node), tensor(tensors.get(name)), codes.get(from)()];
  const [start, count] = [sizes.o[0], sizes.d.reduce((a, b) => a * b, 1)];
  if (!(start >= 0 && start + count <= all.length)) throw new Error(`elements ${start} to ${start + count} of ${all.length} codes`);
  return { flat: translated(all.subarray(start, start + count), table.array, 1), table, sizes };
}

/** A tensor that a call gives by itself. */
function whole(node, tensors) {
  const kind = /^u?(?:(m)|g([2-8]))?([tTcor])([1-8])?((?:p[2-8])*)$/.exec(string(node, NODE.type));
  if (!kind) throw new Error(`codec ${string(node, NODE.type)} is unknown`);
  const [mask, gapBits, values, codeBits] = [Boolean(kind[1]), Number(kind[2] ?? 0), kind[3], Number(kind[4] ?? 0)];
  const inputs = strings(node, NODE.input).map((input) => tensor(tensors.get(input)));
  const sizes = attributes(node);
  const count = sizes.d.reduce((a, b) => a * b, 1);
  const table = inputs.pop();
  const codes = codeBits ? symbols(inputs, codeBits) : null;
  const where = mask ? symbols(inputs, 1).subarray(0, count) : gapBits ? symbols(inputs, gapBits).subarray(0, sizes.p?.[0]) : null;
  kind[5].split("p").slice(1).forEach((width, i) => {
    const plane = symbols(inputs, Number(width)).subarray(0, sizes[`p${i}`]?.[0]);
    for (const place of gapPlaces(plane, Number(width), count)) codes[place] |= 1 << (codeBits + i);
  });
  const flat = where ? sparse(where, gapBits, values, codes, table, count) : everywhere(values, codes, table, count);
  return { flat, table, sizes };
}

/** All elements have a code, or all have one value. */
function everywhere(values, codes, table, count) {
  if (values === "o") {
    if (count * table.array.BYTES_PER_ELEMENT > CONSTANT_AT_MOST) throw new Error(`a constant of ${count} elements`);
    return new table.array.constructor(count).fill(table.array[0]);
  }
  if (!codes || codes.length < count) throw new Error(`${codes?.length ?? 0} codes for ${count} elements`);
  return translated(codes.subarray(0, count), table.array, values === "c" ? table.dims[0] : 1);
}

/** Nonzeros at the places that a mask (gapBits 0) or gaps tell; the rest is zero bits. A zero goes before them in the file, unless "T". */
function sparse(where, gapBits, values, codes, table, count) {
  const places = gapBits ? gapPlaces(where, gapBits, count) : maskPlaces(where);
  const first = values === "T" ? 0 : 1;
  const kept = codes?.subarray(first, places.length + first);
  const nonzeros = values === "c" ? kept : codes ? translated(kept, table.array, 1) : table.array.subarray(1);
  if (where.length < count && !gapBits) throw new Error(`a mask of ${where.length} bits for ${count} elements`);
  if (values !== "o" && nonzeros.length !== places.length) throw new Error(`${nonzeros.length} values for ${places.length} nonzeros`);
  const out = values === "c" ? new Uint8Array(count) : new table.array.constructor(count);
  if (values === "o") for (let i = 0; i < places.length; i++) out[places[i]] = nonzeros[0];
  else for (let i = 0; i < places.length; i++) out[places[i]] = nonzeros[i];
  return values === "c" ? translated(out, table.array, table.dims[0]) : out;
}

function maskPlaces(flags) {
  const places = new Uint32Array(flags.length);
  let found = 0;
  for (let i = 0; i < flags.length; i++) {
    places[found] = i;
    found += flags[i]; // no branch: nonzeros are not to be foreseen
  }
  return places.subarray(0, found);
}

function gapPlaces(symbols, bits, count) {
  const [places, filler] = [new Uint32Array(symbols.length), 2 ** bits - 1];
  let [found, at] = [0, 0];
  for (let i = 0; i < symbols.length; i++) {
    const [gap, real] = [symbols[i], symbols[i] === filler ? 0 : 1];
    places[found] = at + gap;
    found += real;
    at += gap + real;
  }
  if (!(at <= count && count < at + 2 ** bits)) throw new Error(`the gaps span ${at} elements, the tensor has ${count}`);
  return places.subarray(0, found);
}

/** table[code] for each code, with one table a channel where there are several. */
function translated(codes, table, channels) {
  const [width, each] = [table.length / channels, codes.length / channels];
  if (!Number.isInteger(width) || !Number.isInteger(each)) throw new Error(`${codes.length} codes in ${channels} channels`);
  const out = new table.constructor(codes.length);
  for (let channel = 0, i = 0; channel < channels; channel++) {
    for (const stop = i + each, base = channel * width; i < stop; i++) {
      if (codes[i] >= width) throw new Error(`code ${codes[i]} has no entry in the table of ${width}`);
      out[i] = table[base + codes[i]];
    }
  }
  return out;
}

/** The symbols of a stream, taken from the front of the tensors, filled up to a multiple of 8 (torchopt/codecs/bits.py). */
function symbols(tensors, bits) {
  const { type, dims, raw } = tensors.shift();
  if (bits === 8) return raw;
  if (type === UINT4) {
    const count = dims.reduce((a, b) => a * b, 1);
    if (raw.length !== Math.ceil(count / 2)) throw new Error(`${raw.length} bytes do not hold ${count} symbols of 4 bits`);
    const low = new Uint8Array(count);
    for (let i = 0; i < low.length; i++) low[i] = (raw[i >> 1] >> (4 * (i & 1))) & 15;
    if (bits === 4) return low;
    const above = symbols(tensors, bits - 4);
    return low.map((symbol, i) => symbol | (above[i] << 4));
  }
  if (raw.length % bits) throw new Error(`${raw.length} bytes do not hold symbols of ${bits} bits`);
  return bits > 5 ? spread(raw, bits) : parts(raw, bits);
}

/** Widths up to 5 lie in parts of 4, 2 and 1 bits, the lowest first. */
function parts(bytes, bits) {
  const unit = bytes.length / bits;
  const out = new Uint8Array(8 * unit);
  for (let width = 4, low = 0; width; width >>= 1) {
    if (!(bits & width)) continue;
    const [start, length, mask] = [low * unit, width * unit, 2 ** width - 1];
    for (let slot = 0; slot < 8 / width; slot++) {
      for (let i = 0, to = slot * length; i < length; i++, to++) out[to] |= ((bytes[start + i] >> (width * slot)) & mask) << low;
    }
    low += width;
  }
  return out;
}

/** Symbols of 6 and 7 bits lie in the low bits of bytes; the bits above them make the last symbols. */
function spread(bytes, bits) {
  const [width, rows] = [8 - bits, bits / (8 - bits)];
  const row = bytes.length / rows;
  const out = new Uint8Array(bytes.length + row);
  for (let i = 0; i < bytes.length; i++) {
    out[i] = bytes[i] & (2 ** bits - 1);
    out[bytes.length + (i % row)] |= (bytes[i] >> bits) << (width * Math.floor(i / row));
  }
  return out;
}

/** An initializer: its dims, ONNX type, bytes, and the bits of its elements. */
function tensor(field) {
  if (!field) throw new Error("an operand is no constant");
  const all = fields(field.body);
  if (all.some((f) => f.number === TENSOR.location && f.value === 1)) throw new Error("an operand lies in another file");
  const type = all.find((f) => f.number === TENSOR.type)?.value;
  const raw = all.find((f) => f.number === TENSOR.raw)?.body ?? new Uint8Array(0);
  const dims = integers(all, TENSOR.dims);
  if (type === UINT4) return { type, dims, raw };
  if (!(type in ARRAYS)) throw new Error(`an operand of type ${type}`);
  const array = new ARRAYS[type](raw.slice().buffer); // a copy is aligned
  if (dims.reduce((a, b) => a * b, 1) !== array.length) throw new Error(`an operand of ${array.length} elements has shape ${dims}`);
  return { dims, type, raw, array };
}

/** The attributes that are lists of integers, by name. */
function attributes(node) {
  const found = fields(node).filter((f) => f.number === NODE.attribute);
  return Object.fromEntries(found.map((f) => [string(f.body, ATTRIBUTE.name), integers(fields(f.body), ATTRIBUTE.ints)]));
}

// Protocol buffers: a message is a row of fields, each a tag (number, wire type) and a value; messages lie in messages.

function fields(bytes) {
  const found = [];
  for (let at = 0; at < bytes.length; ) {
    const start = at;
    let key, value;
    [key, at] = readVarint(bytes, at);
    const [number, wire] = [Math.floor(key / 8), key % 8];
    let body = null;
    if (wire === 0) [value, at] = readVarint(bytes, at);
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else if (wire === 2) {
      [value, at] = readVarint(bytes, at);
      body = bytes.subarray(at, at + value);
      at += value;
    } else throw new Error(`unpack: is no whole ONNX file (wire type ${wire} at byte ${start})`);
    if (number === 0 || at > bytes.length) throw new Error(`unpack: is no whole ONNX file (a field ends beyond byte ${bytes.length})`);
    found.push({ number, value, body, whole: bytes.subarray(start, at) });
  }
  return found;
}

function readVarint(bytes, at) {
  for (let value = 0, scale = 1, i = 0; i < 10; i++, scale *= 128) {
    if (at >= bytes.length) break;
    const byte = bytes[at++];
    value += (byte & 127) * scale;
    if (byte < 128) return [value, at];
  }
  throw new Error("unpack: is no whole ONNX file (a number has no end)");
}

function integers(all, number) {
  const found = [];
  for (const f of all.filter((f) => f.number === number)) {
    if (f.body === null) found.push(f.value);
    else for (let at = 0, value; at < f.body.length; found.push(value)) [value, at] = readVarint(f.body, at);
  }
  return found;
}

function strings(bytes, number) {
  return fields(bytes).filter((f) => f.number === number && f.body).map((f) => text.decode(f.body));
}

function string(bytes, number) {
  return strings(bytes, number)[0] ?? "";
}

function message(number, pieces) {
  return [tag(number, 2), varint(pieces.reduce((sum, piece) => sum + piece.length, 0)), ...pieces];
}

function tag(number, wire) {
  return varint(number * 8 + wire);
}

function varint(value) {
  const bytes = [];
  for (; value >= 128; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Uint8Array.from([...bytes, value]);
}

function joined(pieces) {
  const out = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) (out.set(piece, at), (at += piece.length));
  return out;
}
