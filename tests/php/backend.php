<?php
// The backend's side of sse-server in PHP. On Debian: apt install php-cli php-curl php-gmp php-msgpack
// (sodium is built in). To try it: SSE_SECRET=… php -S 127.0.0.1:3000 backend.php
// php-fpm hides the environment: its pool needs env[SSE_SECRET] = …, and env[PUSH_PUBLIC_URL] = /push.
declare(strict_types=1);

define('PUSH_URL', getenv('PUSH_URL') ?: 'http://127.0.0.1:8000'); // as this backend reaches it
define('PUSH_PUBLIC_URL', getenv('PUSH_PUBLIC_URL') ?: PUSH_URL); // as browsers reach it

// A Branca token: XChaCha20-Poly1305 in base62, under the first of the secrets.
function mint(array $payload): string
{
    $digits = trim(explode(',', (string) getenv('SSE_SECRET'))[0]); // 64 of them stand for 32 bytes
    ctype_xdigit($digits) && strlen($digits) === 64 || throw new RuntimeException('SSE_SECRET is not set');
    $key = sodium_hex2bin($digits);
    $nonce = random_bytes(24);
    $head = pack('CN', 0xBA, time()) . $nonce;
    $sealed = sodium_crypto_aead_xchacha20poly1305_ietf_encrypt(msgpack_pack($payload), $head, $nonce, $key);
    return gmp_strval(gmp_import($head . $sealed), 62); // its digits are those of Branca
}

// Where to send a browser that may read these topics.
function eventsUrl(string ...$topics): string
{
    return PUSH_PUBLIC_URL . '/events?token=' . mint(['topics' => $topics]);
}

// Delivers all of the events, in order, or none: publish(['topic' => …, 'event' => …, 'data' => …], …)
function publish(array ...$events): string
{
    static $push = null;
    $push ??= curl_init(PUSH_URL . '/submit'); // its connection is kept for the next one of this request
    curl_setopt_array($push, [
        CURLOPT_POSTFIELDS => mint(['events' => $events]),
        CURLOPT_RETURNTRANSFER => true,
        CURLOPT_TIMEOUT => 5,
    ]);
    $answer = curl_exec($push);
    if (curl_getinfo($push, CURLINFO_RESPONSE_CODE) !== 200) {
        throw new RuntimeException('not published: ' . ($answer ?: curl_error($push)));
    }
    return $answer; // {"events": …, "deliveries": …}
}

// What is above is for your application, in a file of its own. One that uses both: GET /events to listen,
// POST /news to tell everyone.
$request = $_SERVER['REQUEST_METHOD'] . ' ' . parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH);
if ($request === 'GET /events') { // check here who asks
    header('Cache-Control: no-store');
    header('Location: ' . eventsUrl('news'), true, 307);
} elseif ($request === 'POST /news') {
    try {
        echo publish(['topic' => 'news', 'data' => file_get_contents('php://input')]);
    } catch (RuntimeException $error) { // in yours: log it; what was changed before stays changed
        http_response_code(502);
        echo $error->getMessage();
    }
} else {
    http_response_code(404);
}
