// An Express application with the middleware that many have: `compression`, and
// `http-proxy-middleware` in front of another server. node relay.mjs TARGET
import compression from "compression";
import express from "express";
import { createProxyMiddleware } from "http-proxy-middleware";

const app = express();
app.use(compression({ threshold: 0 }));
app.use(createProxyMiddleware({ target: process.argv[2] }));
const server = app.listen(0, "127.0.0.1", () => {
  console.log(`listening on http://127.0.0.1:${server.address().port}`);
});
