// A real OpenID Connect provider (oidc-provider) on a free port of this machine, for tests. Client `robot` gets access
// tokens by client credentials. Prints its issuer first, then answers each line of standard input with one line:
//   rotate        new signing keys, the old ones are gone
//   clock MS      the provider's clock goes on this many milliseconds beside the true time
//   fetches       how often its keys were fetched
// Ends with its standard input.
import { generateKeyPairSync } from 'node:crypto';
import { createServer } from 'node:http';
import { createInterface } from 'node:readline';

import Provider from 'oidc-provider';

const audience = 'https://inferflux.example';
console.log = console.info = console.warn = console.error; // standard output is for answers
const say = (line) => process.stdout.write(`${line}\n`);
const trueNow = Date.now;
let skew = 0;
Date.now = () => trueNow() + skew;

const resources = {
  [audience]: { audience, alg: 'RS256' },
  [`${audience}/es256`]: { audience, alg: 'ES256' },
  'https://other.example': { audience: 'https://other.example', alg: 'RS256' },
};

let generation = 0;
function newKeys() {
  generation += 1;
  const pairs = {
    RS256: generateKeyPairSync('rsa', { modulusLength: 2048 }),
    ES256: generateKeyPairSync('ec', { namedCurve: 'P-256' }),
  };
  return Object.entries(pairs).map(([alg, pair]) => ({
    ...pair.privateKey.export({ format: 'jwk' }), alg, use: 'sig', kid: `${alg}-${generation}`,
  }));
}

function newProvider(issuer) {
  return new Provider(issuer, {
    jwks: { keys: newKeys() },
    cookies: { keys: ['unused'] },
    clients: [{
      client_id: 'robot', client_secret: 'a secret for tests', token_endpoint_auth_method: 'client_secret_post',
      grant_types: ['client_credentials'],
      redirect_uris: [], response_types: [],
    }],
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: (_ctx, resource) => ({
          scope: 'user operator', audience: resources[resource].audience, accessTokenTTL: 600,
          accessTokenFormat: 'jwt', jwt: { sign: { alg: resources[resource].alg } },
        }),
      },
    },
  });
}

let answer;
let fetches = 0;
const server = createServer((request, response) => {
  fetches += request.url === '/jwks';
  answer(request, response);
});
server.listen(0, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  answer = newProvider(issuer).callback();
  const commands = {
    rotate: () => { answer = newProvider(issuer).callback(); return 'ok'; },
    clock: (milliseconds) => { skew = Number(milliseconds); return 'ok'; },
    fetches: () => fetches,
  };
  say(issuer);
  createInterface({ input: process.stdin })
    .on('line', (line) => { const [name, argument] = line.split(' '); say(commands[name](argument)); })
    .on('close', () => process.exit(0));
});
