#!/usr/bin/env bash
# Reports of the golden plans, as a reader sees them: run.sh FOLDER MIST
#
# Chromium comes from the distribution's packages, the rest from npm. Screenshots stay in FOLDER.
set -euo pipefail
folder=$1 mist=$2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder/screenshots"
if ! command -v chromium >/dev/null; then
    apt-get install --yes --no-install-recommends chromium fonts-dejavu-core
fi
for plan in plans/*.yaml; do
    "$mist" report "$plan" --price 2 --out "$folder/$(basename "$plan" .yaml).html" --force
done
cd "$folder"
npm install --silent --no-save --prefix . puppeteer-core@24.43.1 axe-core@4.14.1
node "$here/check.mjs" "$(command -v chromium)" screenshots ./*.html
