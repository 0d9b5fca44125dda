-- What export-gate does in these lines, as far as a script can: verify, count, refuse. By libcrypto, as lua-resty-openssl does, but with
-- contexts that are kept.
local base64 = require "ngx.base64"
local cjson = require "cjson.safe"
local ffi = require "ffi"
local lrucache = require "resty.lrucache"

ffi.cdef [[
typedef struct evp_md_st EVP_MD; typedef struct evp_pkey_st EVP_PKEY; typedef struct evp_pkey_ctx_st EVP_PKEY_CTX;
typedef struct hmac_ctx_st HMAC_CTX; typedef struct bio_st BIO;
const EVP_MD *EVP_sha256(void);
unsigned char *SHA256(const unsigned char *d, size_t n, unsigned char *md);
int CRYPTO_memcmp(const void *a, const void *b, size_t len);
HMAC_CTX *HMAC_CTX_new(void);
int HMAC_Init_ex(HMAC_CTX *ctx, const void *key, int key_len, const EVP_MD *md, void *impl);
int HMAC_Update(HMAC_CTX *ctx, const unsigned char *data, size_t len);
int HMAC_Final(HMAC_CTX *ctx, unsigned char *md, unsigned int *len);
BIO *BIO_new_mem_buf(const void *buf, int len);
EVP_PKEY *PEM_read_bio_PUBKEY(BIO *bp, EVP_PKEY **x, void *cb, void *u);
EVP_PKEY_CTX *EVP_PKEY_CTX_new(EVP_PKEY *pkey, void *e);
int EVP_PKEY_verify_init(EVP_PKEY_CTX *ctx);
int EVP_PKEY_CTX_set_signature_md(EVP_PKEY_CTX *ctx, const EVP_MD *md);
int EVP_PKEY_verify(EVP_PKEY_CTX *ctx, const unsigned char *sig, size_t siglen, const unsigned char *tbs, size_t tbslen);
]]
local crypto = ffi.load("crypto.so.3")
local digest = ffi.new("unsigned char[32]")
local byte, char, find, gsub, sub = string.byte, string.char, string.find, string.gsub, string.sub
local SECONDS_OF_A_WEEK = 604800
local _M, options, hmac, verifier, good_head = {}, nil, nil, nil, nil

-- Callers by their `Authorization`, until their token ends: RS256 and ES256 are too dear to be verified at each request. What
-- lua-resty-openidc does in a shared dict, which would have to be decoded each time. The gate has room for about as many, and so has Envoy.
local callers = assert(lrucache.new(50000))

-- An integer of DER, of 32 bytes.
local function integer(bytes)
    bytes = gsub(bytes, "^%z+", "")
    if bytes == "" or byte(bytes) >= 128 then bytes = "\0" .. bytes end
    return "\2" .. char(#bytes) .. bytes
end

-- Of the first `length` bytes. They are no string of their own: LuaJIT looks at few bytes of a string as it files it, and those that
-- differ by user alone would be filed in one place.
local function verified(token, length, signature)
    if options.alg == "HS256" then
        crypto.HMAC_Init_ex(hmac, nil, 0, nil, nil)
        crypto.HMAC_Update(hmac, token, length)
        crypto.HMAC_Final(hmac, digest, nil)
        return #signature == 32 and crypto.CRYPTO_memcmp(digest, signature, 32) == 0
    end
    if options.alg == "ES256" then
        if #signature ~= 64 then return false end
        local both = integer(sub(signature, 1, 32)) .. integer(sub(signature, 33))
        signature = "\48" .. char(#both) .. both
    end
    crypto.SHA256(token, length, digest)
    return crypto.EVP_PKEY_verify(verifier, signature, #signature, digest, 32) == 1
end

local function is_good(head)
    if head == good_head then return true end
    local header = cjson.decode(base64.decode_base64url(head) or "")
    if not header or header.alg ~= options.alg then return false end
    good_head = head
    return true
end

local function claims(token)
    local first = find(token, ".", 1, true)
    local second = first and find(token, ".", first + 1, true)
    if not second or not is_good(sub(token, 1, first - 1)) then return nil end
    if not verified(token, second - 1, base64.decode_base64url(sub(token, second + 1)) or "") then return nil end
    local claims = cjson.decode(base64.decode_base64url(sub(token, first + 1, second - 1)) or "")
    local is_ours = claims and claims.iss == options.issuer and claims.aud == options.audience and claims.sub
    return is_ours and (claims.exp or 0) > ngx.time() and claims or nil
end

local function caller_of(sent)
    local known = callers:get(sent)
    if known then return known end
    local claims = sub(sent, 1, 7) == "Bearer " and claims(sub(sent, 8))
    if not claims then return nil end
    local caller = { user = claims.sub, is_free = claims.plan == "free" }
    callers:set(sent, caller, claims.exp - ngx.time())
    return caller
end

-- Calls INCR of Redis on a kept connection; a counter goes after its week.
local function incremented_by_redis(key)
    local socket = ngx.socket.tcp()
    socket:settimeout(1000)
    if not socket:connect("127.0.0.1", options.redis) then return nil end
    socket:send({ "*2\r\n$4\r\nINCR\r\n$", #key, "\r\n", key, "\r\n" })
    local line = socket:receive()
    local count = line and tonumber(sub(line, 2))
    if count == 1 then
        socket:send({ "*3\r\n$6\r\nEXPIRE\r\n$", #key, "\r\n", key, "\r\n$6\r\n", SECONDS_OF_A_WEEK, "\r\n" })
        socket:receive()
    end
    socket:setkeepalive(60000, 256)
    return count
end

function _M.setup(settings)
    options = settings
    local key = options.key
    if options.alg == "HS256" then
        hmac = crypto.HMAC_CTX_new()
        assert(crypto.HMAC_Init_ex(hmac, key, #key, crypto.EVP_sha256(), nil) == 1)
    else
        verifier = crypto.EVP_PKEY_CTX_new(crypto.PEM_read_bio_PUBKEY(crypto.BIO_new_mem_buf(key, #key), nil, nil, nil), nil)
        assert(crypto.EVP_PKEY_verify_init(verifier) == 1)
        assert(crypto.EVP_PKEY_CTX_set_signature_md(verifier, crypto.EVP_sha256()) == 1)
    end
end

function _M.check()
    local sent = ngx.var.http_authorization
    local caller = sent and caller_of(sent)
    if not caller then return ngx.exit(401) end
    local key = caller.user .. math.floor((ngx.time() - options.week_starts) / SECONDS_OF_A_WEEK)
    local count
    if options.redis then
        count = incremented_by_redis(key)
    else
        count = ngx.shared.counts:incr(key, 1, 0)
    end
    if not count then return ngx.exit(503) end
    if caller.is_free and count > options.free_limit then return ngx.exit(429) end
end

return _M
