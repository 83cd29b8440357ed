// One pinned connection to a node, in a session, and the calls that a client makes first.
import crypto from 'node:crypto';
import tls from 'node:tls';
import grpc from '@grpc/grpc-js';
import { decode } from '@msgpack/msgpack';
import {
  badge, encoded, floats, keyId, message, peerId, publicKeyOf, sign, unpackEntries, v1, verify,
} from './wire.js';

const VERSION = 5;
const TLS_NAME = 'talkoot.peer';
const CHUNK = 128 * 1024;
const DEADLINE_MS = 30_000;

const isOnCurve = (key) => key.asymmetricKeyDetails?.namedCurve === 'prime256v1';

// The certificate that the server shows, PEM, if its key is the peer's.
function certificate(host, port, peer) {
  return new Promise((resolve, reject) => {
    const options = { host, port, servername: TLS_NAME, ALPNProtocols: ['h2'], rejectUnauthorized: false };
    const socket = tls.connect({ ...options, timeout: DEADLINE_MS }, () => {
      const shown = new crypto.X509Certificate(socket.getPeerCertificate().raw);
      socket.destroy();
      const isPeers = isOnCurve(shown.publicKey) && peerId(publicKeyOf(shown.publicKey)).equals(peer);
      isPeers ? resolve(Buffer.from(shown.toString())) : reject(new Error('another peer answers there'));
    });
    socket.on('error', reject).on('timeout', () => socket.destroy(new Error('nobody answers there')));
  });
}

export class Node {
  static async open(host, port, peer, swarm, rights, token) {
    const address = host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`;
    const node = new Node(swarm, address, await certificate(host, port, peer));
    await node.openSession(peer, rights, token);
    return node;
  }

  constructor(swarm, address, pem) {
    const options = { 'grpc.ssl_target_name_override': TLS_NAME, 'grpc.default_authority': TLS_NAME };
    const services = [v1.SessionService, v1.DhtService, v1.ExpertService];
    this.clients = services.map((service) => new service(address, grpc.credentials.createSsl(pem), options));
    this.header = { protocol_version: VERSION, swarm_id: swarm };
    this.metadata = new grpc.Metadata();
  }

  // `rights`: names of the enum Right. `token`: of the invite, if it has one.
  async openSession(peer, rights, token) {
    // for this run alone; a peer that wants to keep its name keeps its key
    const { privateKey, publicKey } = crypto.generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const public_key = publicKeyOf(publicKey);
    const caller = peerId(public_key);
    const { challenge } = await this.call('Challenge', {});
    const said = { ...this.header, server: peer, caller, challenge, rights, badge: token && badge(token, caller) };
    const statement = encoded('OpenStatement', said);
    const signature = sign(privateKey, 'session', statement);
    const { session } = await this.call('Open', { statement, public_key, signature });
    this.metadata.set('talkoot-session-bin', session);
  }

  call(method, request) {
    const client = this.clients.find((each) => each[method]);
    const options = { deadline: Date.now() + DEADLINE_MS };
    return new Promise((resolve, reject) =>
      client[method](request, this.metadata, options, (error, reply) => (error ? reject(error) : resolve(reply))));
  }

  // The payload of the record that a peer has signed under a key of the DHT, if this node stores it.
  async record(key, writer) {
    const { results } = await this.call('Find', { keys: [keyId(key)] });
    const entries = results[0]?.value.length ? unpackEntries(results[0].value) : [];
    const [, packed] = entries.find(([subkey]) => writer.equals(subkey)) ?? [];
    if (!packed) throw new Error(`${key} is not stored here: ask the nodes nearest to it`);
    const { payload, public_key, signature } = message('SignedRecord').decode(decode(packed));
    const said = message('RecordPayload').decode(payload);
    const isRight = said.key === key && said.expires_at > Date.now() / 1000;
    const signed = Buffer.concat([public_key, payload]);
    if (!isRight || !writer.equals(peerId(public_key)) || !verify(public_key, 'record', signed, signature))
      throw new Error(`the record under ${key} is wrong`);
    return said;
  }

  // One sequence of `rows` of numbers through experts. Returns the answer to each row, and what each expert replied.
  async forward(rows, experts) {
    const width = rows[0].length;
    const header = {
      ...this.header, request_id: crypto.randomBytes(16), width, codec: 'CODEC_FP32', experts,
      segment_lengths: [rows.length], positions: [...rows.keys()],
    };
    const sent = Buffer.from(Float32Array.from(rows.flat()).buffer);
    const client = this.clients.find((each) => each.Forward);
    const call = client.Forward(this.metadata, { deadline: Date.now() + DEADLINE_MS });
    call.write({ header });
    for (let at = 0; at < sent.length; at += CHUNK) call.write({ chunk: sent.subarray(at, at + CHUNK) });
    call.end();

    const replies = [], places = [], chunks = [], answers = [];
    for await (const reply of call) {
      for (const expert of reply.experts) replies[expert.index] = expert;
      for (const block of reply.rows) places.push(...(block.rows.length ? block.rows : rows.keys()));
      chunks.push(reply.chunk);
    }
    const numbers = floats(Buffer.concat(chunks));
    if (numbers.length !== width * places.length) throw new Error('not the tensors that were announced');
    places.forEach((row, n) => (answers[row] = numbers.slice(n * width, (n + 1) * width)));
    return { answers, replies };
  }

  close() {
    for (const client of this.clients) client.close();
  }
}
