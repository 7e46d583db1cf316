// A JavaScript libp2p peer: dials the multiaddr it is given, identifies and pings; prints one line of JSON.
import './node20.js'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const node = await createLibp2p({
  transports: [tcp()], connectionEncrypters: [noise()], streamMuxers: [yamux()], services: { identify: identify({ runOnConnectionOpen: false }), ping: ping() }
})
const connection = await node.dial(multiaddr(process.argv[2]), { signal: AbortSignal.timeout(10_000) })
const { protocols, agentVersion } = await node.services.identify.identify(connection)
const pings = []
for (let i = 0; i < 3; i++) pings.push(await node.services.ping.ping(connection.remotePeer))
console.log(JSON.stringify({
  peer_id: connection.remotePeer.toString(), encryption: connection.encryption, multiplexer: connection.multiplexer, agent: agentVersion, protocols, pings
}))
await node.stop()
