// node forward.js INVITE: sends three rows of numbers through two experts of the node that the invite names.
import { Node } from './node.js';
import { bytesOf, fromBase58, readInvite, swarmId } from './wire.js';

if (!process.argv[2]) {
  console.error('usage: node forward.js INVITE, the line that a node prints, such as talkoot2…');
  process.exit(2);
}
// such as a mistyped invite, or a node that does not answer
process.on('uncaughtException', (error) => {
  console.error(`error: ${error.message}`);
  process.exit(1);
});
const invite = readInvite(process.argv[2]);
const swarm = swarmId(invite.name, invite.author);
const direct = invite.bootstrap_addresses.find((address) => !address.includes('p2p-circuit'));
const [, , host, , port, , peer] = direct.split('/'); // /ip4/192.0.2.7/tcp/31337/p2p/Qm…

const node = await Node.open(host, port, fromBase58(peer), swarm, ['RIGHT_FORWARD', 'RIGHT_DHT'], invite.token);
const { manifest_json } = await node.record(`${swarm}.manifest`, invite.author);
const manifest = JSON.parse(manifest_json);
const width = manifest.experts.width ?? manifest.model.hidden;
const { experts, software_version } = await node.call('Info', node.header);
console.log(`swarm ${swarm}: this node runs ${software_version} and hosts ${experts.length} experts of width ${width}`);

const rows = [0, 1, 2].map((row) => Array.from({ length: width }, (_, i) => Math.sin(row * width + i)));
const asked = experts.slice(0, 2).map(({ uid }, i) => ({ uid, weights: bytesOf(rows.map(() => i + 1)) }));
const { answers, replies } = await node.forward(rows, asked);
replies.forEach(({ status, message, update_count }, i) =>
  console.log(`expert ${asked[i].uid}: ${status ? `status ${status}: ${message}` : `${update_count} updates`}`));
answers.forEach((answer, row) => console.log(`row ${row}: ${answer.join(' ')}`));
node.close();
