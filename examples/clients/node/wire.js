// Messages, names and signatures, as docs/protocol.md describes them. vectors.js checks them against proto/vectors.json.
import crypto from 'node:crypto';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';
import { decode, encode, ExtensionCodec } from '@msgpack/msgpack';
import protobuf from 'protobufjs';

const BASE58 = '123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz';
const PROTO = fileURLToPath(new URL('../../../proto', import.meta.url));
const FILES = ['session', 'expert', 'dht', 'records'].map((name) => path.join(PROTO, `${name}.proto`));

// the files import each other as peer/wire/NAME.proto
const root = new protobuf.Root();
root.resolvePath = (_, target) => path.join(PROTO, path.basename(target));
root.loadSync(FILES, { keepCase: true });
export const { v1 } = grpc.loadPackageDefinition(loader.fromJSON(root.toJSON(), { keepCase: true, defaults: true })).talkoot;
export const message = (name) => root.lookupType(`talkoot.v1.${name}`);
export const encoded = (name, said) => message(name).encode(message(name).fromObject(said)).finish();

// of CODEC_FP32
export const floats = (bytes) => Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readFloatLE(4 * i));
export function bytesOf(numbers) {
  const bytes = Buffer.alloc(4 * numbers.length);
  numbers.forEach((number, i) => bytes.writeFloatLE(number, 4 * i));
  return bytes;
}

const hash = (name, data) => crypto.createHash(name).update(data).digest();

export function base58(bytes) {
  let text = '';
  for (let n = BigInt(`0x${bytes.toString('hex')}`); n; n /= 58n) text = BASE58[Number(n % 58n)] + text;
  return text;
}

export function fromBase58(text) {
  const hex = [...text].reduce((n, c) => n * 58n + BigInt(BASE58.indexOf(c)), 0n).toString(16);
  return Buffer.from(hex.padStart(hex.length + (hex.length % 2), '0'), 'hex');
}

export function readInvite(line) {
  const bytes = fromBase58(line.trim().slice('talkoot2'.length));
  const body = bytes.subarray(0, -4);
  const checksum = hash('sha256', hash('sha256', body)).subarray(0, 4);
  if (!checksum.equals(bytes.subarray(-4))) throw new Error('the invite is incomplete or mistyped');
  return message('InviteMessage').decode(body);
}

export const swarmId = (name, author) => `${name}-${base58(author).slice(-12)}`;

// public keys are compressed points; in DER, they have both coordinates
const HEAD = Buffer.from('3059301306072a8648ce3d020106082a8648ce3d030107034200', 'hex');
const convert = (point, form) => crypto.ECDH.convertKey(point, 'prime256v1', undefined, undefined, form);
const inDer = (point) => Buffer.concat([HEAD, convert(point, 'uncompressed')]);
export const publicKeyOf = (key) =>
  convert(key.export({ format: 'der', type: 'spki' }).subarray(HEAD.length), 'compressed');

// the hash of libp2p's PublicKey message
export function peerId(publicKey) {
  const message = Buffer.concat([Buffer.from([8, 3, 18, 91]), inDer(publicKey)]);
  return Buffer.concat([Buffer.from([18, 32]), hash('sha256', message)]);
}

const plain = (key) => ({ key, dsaEncoding: 'ieee-p1363' });
const signed = (domain, data) => Buffer.concat([Buffer.from(`talkoot ${domain} v1\0`), data]);
// of s and ORDER - s, others accept the smaller one
const ORDER = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551n;
export function sign(key, domain, data) {
  const signature = crypto.sign('sha256', signed(domain, data), plain(key));
  const s = BigInt(`0x${signature.toString('hex', 32)}`);
  if (2n * s > ORDER) signature.write((ORDER - s).toString(16).padStart(64, '0'), 32, 'hex');
  return signature;
}
export function verify(publicKey, domain, data, signature) {
  const key = crypto.createPublicKey({ key: inDer(publicKey), format: 'der', type: 'spki' });
  return crypto.verify('sha256', signed(domain, data), plain(key), signature);
}

// the token's Ed25519 key signs who holds it
export function badge(token, holder) {
  const der = Buffer.concat([Buffer.from('302e020100300506032b657004220420', 'hex'), token.secret]);
  const key = crypto.createPrivateKey({ key: der, format: 'der', type: 'pkcs8' });
  const { grant, signature } = token;
  return { grant, signature, holder_signature: crypto.sign(null, signed('badge', holder), key) };
}

export const keyId = (key) => hash('sha1', encode(key));

const entries = new ExtensionCodec();
// rows without a value have the last one
const whole = ([, , rows, common]) => rows.map((row) => (row.length < 3 ? [row[0], common, row[1]] : row));
entries.register({ type: 0x50, encode: () => null, decode: (data) => whole(decode(data)) });
export const unpackEntries = (value) => decode(value, { extensionCodec: entries });

