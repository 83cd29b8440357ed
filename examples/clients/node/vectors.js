// node vectors.js: compares what wire.js makes of the keys in proto/vectors.json with what is there.
import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import { readFileSync } from 'node:fs';
import {
  badge, base58, bytesOf, encoded, floats, keyId, message, peerId, readInvite, sign, swarmId, unpackEntries, verify,
} from './wire.js';

const vectors = JSON.parse(readFileSync(new URL('../../../proto/vectors.json', import.meta.url)));
const { founder, caller } = vectors.peers;
const bytes = (hex) => Buffer.from(hex, 'hex');
const author = bytes(founder.peer_id), holder = bytes(caller.peer_id);

for (const peer of [founder, caller]) {
  assert.equal(peerId(bytes(peer.public_key)).toString('hex'), peer.peer_id);
  assert.equal(base58(bytes(peer.peer_id)), peer.peer_id_base58);
  // the file of a key: four bytes of libp2p's message, and SEC 1
  const key = crypto.createPrivateKey({ key: bytes(peer.key_file).subarray(4), format: 'der', type: 'sec1' });
  assert(verify(bytes(peer.public_key), 'session', author, sign(key, 'session', author)));
  assert(!verify(bytes(peer.public_key), 'record', author, sign(key, 'session', author)));
}

const { swarm, session, dht, forward } = vectors;
assert.equal(swarmId(swarm.name, author), swarm.swarm_id);
const invite = readInvite(swarm.invite_with_token);
assert.deepEqual(Buffer.from(invite.author), author);
assert.equal(Buffer.from(badge(invite.token, holder).holder_signature).toString('hex'), vectors.badge.holder_signature);

const statement = encoded('OpenStatement', {
  protocol_version: vectors.protocol_version, swarm_id: swarm.swarm_id, server: author, caller: holder,
  challenge: bytes(session.challenge), rights: session.rights, badge: badge(invite.token, holder),
});
assert.equal(Buffer.from(statement).toString('hex'), session.statement);

for (const [domain, peer, data, signature] of [
  ['session', caller, session.statement, session.signature],
  ['grant', founder, vectors.badge.grant, vectors.badge.grant_signature],
  ['record', founder, founder.public_key + dht.record.payload, dht.record.signature],
  ['contact', founder, dht.contact.statement, dht.contact.signature],
  ['receipt', caller, vectors.receipt.receipt, vectors.receipt.signature],
]) assert(verify(bytes(peer.public_key), domain, bytes(data), bytes(signature)), domain);

for (const [key, id] of Object.entries(dht.keys)) assert.equal(keyId(key).toString('hex'), id);
const entries = unpackEntries(bytes(dht.dictionary));
const values = [dht.index_entry.value, dht.index_entry.value, dht.record.value];
assert.deepEqual(entries.map(([, value]) => Buffer.from(value).toString('hex')), values);

assert.deepEqual(floats(bytes(vectors.codecs.fp32.bytes)), vectors.codecs.numbers.flat());
assert.equal(bytesOf(vectors.codecs.numbers[0]).toString('hex'), vectors.codecs.beside.fp32);
const reply = message('CallReply').decode(bytes(forward.reply));
assert.deepEqual(floats(reply.chunk), forward.answers.flat());
console.log('all vectors agree');
